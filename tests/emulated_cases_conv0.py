"""Launchers of csrc/conv0.h on NumPy arrays of exactly the right size; see ``emulated_cases.py``."""

import ctypes
from math import erf, pi

import numpy as np

EPS = 1e-5
STRIDE = 4
cdf = np.vectorize(lambda u: 0.5 * (1 + erf(u / 2**0.5)))


def members(kind, names):
    return [(name, kind) for name in names.split()]


class Conv0(ctypes.Structure):
    _fields_ = [
        ("waveforms", ctypes.c_void_p),
        *members(ctypes.c_int64, "row_stride rows frames_per_row stride"),
        *members(ctypes.c_void_p, "segments table"),
        ("num_segments", ctypes.c_int64),
        *members(ctypes.c_void_p, "weight bias gamma beta"),
        *members(ctypes.c_int64, "C taps"),
        ("eps", ctypes.c_double),
        *members(ctypes.c_int64, "layer bf16 programs"),
    ]


class Fold(ctypes.Structure):
    _fields_ = [*members(ctypes.c_void_p, "folded table scratch"), ("shares", ctypes.c_int64)]


class Sums(ctypes.Structure):
    _fields_ = members(ctypes.c_void_p, "outer outer_sum inner inner_sum")


def nans(*shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype=dtype)


class Case:
    """A problem with all its memory, filled with NaN where the kernels are to write."""

    def __init__(self, taps, C, frames, layer, segments=None, rows=2, programs=3):
        random = np.random.default_rng(taps)
        self.taps, self.C, self.frames, self.rows, self.layer = taps, C, frames, rows, layer
        # exactly as many samples as the frames read
        self.x = random.normal(size=(rows, (frames - 1) * STRIDE + taps)).astype(np.float32)
        self.parameters = [random.normal(size=s).astype(np.float32) for s in ((C, taps), C, C, C)]
        self.dy = random.normal(size=(rows * frames, C)).astype(np.float16)
        self.segments = segments or [(r * frames, frames) for r in range(rows)]
        self.programs, self.count = programs, 1 if layer else len(self.segments)
        self.keep = [np.array(segments, dtype=np.int64), np.zeros((len(segments) + 1, 4), np.int64)] if segments else []
        self.exact, self.width, self.columns, factor = (10, 16, 16, 24) if taps == 10 else (16, 32, 24, 60)
        self.problem = Conv0(
            self.x.ctypes.data, self.x.shape[1], rows, frames, STRIDE,
            *([v.ctypes.data for v in self.keep] or [None, None]), len(self.segments),
            *(v.ctypes.data for v in self.parameters), C, taps, EPS, layer, 0, programs,
        )  # fmt: skip
        shares, pairs = 3, (taps + 1) * (taps + 2) // 2
        memory = (
            np.full((self.count, 2, C, self.width), 0x7FFF, dtype=np.uint16),
            nans(4, factor) if layer else nans(self.count, self.exact),
            nans(self.exact + 1, dtype=np.float64) if layer else nans(self.count, shares, pairs, dtype=np.float64),
        )
        self.keep += memory
        self.fold = Fold(*(v.ctypes.data for v in memory), shares)
        self.y = nans(rows * frames, C, dtype=np.float16)
        self.stats = nans(rows * frames) if layer else nans(self.count, taps + taps**2, dtype=np.float64)

    def reference(self):
        """y and the gradients [C, taps + 3], in float64."""
        w, b, gamma, beta = (v.astype(np.float64) for v in self.parameters)
        taps = np.stack([self.x[:, i * STRIDE : i * STRIDE + self.taps] for i in range(self.frames)], 1)
        taps = taps.reshape(-1, self.taps).astype(np.float64)
        y, grads = np.zeros(self.dy.shape), np.zeros((self.C, self.taps + 3))
        for first, count in [(0, len(taps))] if self.layer else self.segments:
            x, dy = taps[first : first + count], self.dy[first : first + count].astype(np.float64)
            if not count:
                continue
            axis = 1 if self.layer else 0
            z = x @ w.T + b
            rstd = 1 / np.sqrt(z.var(axis, keepdims=True) + EPS)
            h = (z - z.mean(axis, keepdims=True)) * rstd
            u = h * gamma + beta
            y[first : first + count] = u * cdf(u)
            du = dy * (cdf(u) + u * np.exp(-u * u / 2) / (2 * pi) ** 0.5)
            dh = du * gamma
            dz = rstd * (dh - dh.mean(axis, keepdims=True) - h * (dh * h).mean(axis, keepdims=True))
            grads += np.concatenate([dz.T @ x, np.stack([dz.sum(0), (du * h).sum(0), du.sum(0)], 1)], 1)
        return y, grads

    def run(self, library):
        y, grads = self.reference()
        pointers = ctypes.byref(self.problem), ctypes.byref(self.fold)
        stats = ctypes.c_void_p(self.stats.ctypes.data)
        assert library.d2v_conv0_fwd(*pointers, ctypes.c_void_p(self.y.ctypes.data), stats, None) == 0
        assert np.isfinite(self.y).all() and np.isfinite(self.stats).all()
        assert np.abs(self.y - y).max() < 5e-4 * np.abs(y).max()
        programs = self.programs if self.layer else 0
        memory = (
            nans(self.programs + self.count - 1, self.C, self.columns),
            nans(self.count, self.C, self.columns),
            nans(programs, self.C // 64, self.width, self.columns),
            nans(self.width, self.columns),
        )
        got, sums = nans(self.C, self.taps + 3), Sums(*(v.ctypes.data for v in memory))
        dy = ctypes.c_void_p(self.dy.ctypes.data)
        assert (
            library.d2v_conv0_bwd(*pointers, ctypes.byref(sums), dy, stats, ctypes.c_void_p(got.ctypes.data), None) == 0
        )
        assert np.abs(got - grads).max() < 2e-3 * np.abs(grads).max()


def refused(library, taps, C):
    case = Case(10, 64, 2, True)
    case.problem.taps, case.problem.C = taps, C
    arguments = ctypes.byref(case.problem), ctypes.byref(case.fold), ctypes.c_void_p(case.y.ctypes.data), None, None
    assert library.d2v_conv0_fwd(*arguments) != 0


def cases(library):
    ragged = [(0, 0), (2, 70), (73, 1), (90, 3), (95, 5)]  # of 2 rows of 75 frames
    for shape in ((10, 128, 66), (16, 320, 2), (3, 64, 1)):  # taps, C, frames
        yield "conv0_layer-{}-{}-{}".format(*shape), lambda shape=shape: Case(*shape, True).run(library)
    yield "conv0_group", lambda: Case(10, 64, 75, False).run(library)
    for shape in ((10, 64, 75), (7, 64, 75)):
        yield "conv0_segments-{}-{}-{}".format(*shape), lambda shape=shape: Case(*shape, False, ragged).run(library)
    for taps, C in ((17, 64), (10, 96), (0, 64)):
        yield f"conv0-refused-{taps}-{C}", lambda taps=taps, C=C: refused(library, taps, C)
