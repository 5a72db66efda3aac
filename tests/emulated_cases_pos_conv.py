"""Launchers of csrc/pos_conv.h on NumPy arrays of exactly the right size; see ``emulated_cases.py``."""

import ctypes
from math import erf

import numpy as np

GROUPS, WIDTH = 2, 32
C = GROUPS * WIDTH
SEGMENTS = [(3, 66), (69, 9)]  # of 80 rows; also a tile to spare
EPS = 1e-5
gelu = np.vectorize(lambda u: 0.5 * u * (1 + erf(u / 2**0.5)))
slope = np.vectorize(lambda u: 0.5 * (1 + erf(u / 2**0.5)) + u * np.exp(-u * u / 2) / (2 * np.pi) ** 0.5)


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "num_tiles", "frames", "groups", "width", "taps", "bf16")),
        ("tiles", ctypes.c_void_p),
    ]


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


def aligned(x):
    """A copy that starts on a 16-byte boundary, as malloc has it."""
    out = np.array(x, order="C")
    assert out.ctypes.data % 16 == 0
    return out


def nans(*shape, dtype=np.float32):
    return aligned(np.full(shape, np.nan, dtype=dtype))


class Problem:
    """Random rows in segments, and one layer's weights; everything float16."""

    def __init__(self, taps, rows=80, segments=SEGMENTS):
        random = np.random.default_rng(taps)
        self.taps, self.rows, self.segments = taps, rows, segments
        self.x, self.below, self.grad = (aligned(random.normal(size=(rows, C)).astype(np.float16)) for _ in range(3))
        scale = (WIDTH * taps) ** -0.5
        self.weight = (random.normal(size=(GROUPS, taps, WIDTH, WIDTH)) * scale).astype(np.float16)  # out, in
        self.bias = aligned(random.normal(size=C).astype(np.float32))
        table = [(first, first, first + count) for first, count in segments] + [(rows, rows, rows)]
        self.table = np.array(table, dtype=np.int64)
        self.shape = Shape(rows, len(table), rows, GROUPS, WIDTH, taps, 0, self.table.ctypes.data)

    def arranged(self, transposed):
        """Place 8 j + 2 q + e of each 16 outputs holds channel 4 q + 2 j + e."""
        w = self.weight.swapaxes(2, 3) if transposed else self.weight
        place = np.arange(WIDTH)
        j, q, e = place % 16 // 8, place % 8 // 2, place % 2
        return aligned(w[:, :, place // 16 * 16 + 4 * q + 2 * j + e])

    def inside(self, values):
        """``values`` [rows, ...] of the rows in segments."""
        return np.concatenate([values[first : first + count] for first, count in self.segments])

    def pairs(self):
        """(row of the result, tap, row that it reads)."""
        for first, count in self.segments:
            for row in range(first, first + count):
                for tap in range(self.taps):
                    source = row + tap - self.taps // 2
                    if first <= source < first + count:
                        yield row, tap, source

    def conv(self, x):
        z = np.tile(self.bias.astype(np.float64), (self.rows, 1)).reshape(self.rows, GROUPS, WIDTH)
        x = x.astype(np.float64).reshape(z.shape)
        for row, tap, source in self.pairs():
            z[row] += np.einsum("goi,gi->go", self.weight[:, tap].astype(np.float64), x[source])
        return z.reshape(self.rows, C)

    def conv_grad(self, grad, x):
        """Gradients in x and in the weight."""
        grad, x = (v.astype(np.float64).reshape(self.rows, GROUPS, WIDTH) for v in (grad, x))
        grad_x, grad_weight = np.zeros_like(x), np.zeros(self.weight.shape)
        for row, tap, source in self.pairs():
            grad_x[source] += np.einsum("goi,go->gi", self.weight[:, tap].astype(np.float64), grad[row])
            grad_weight[:, tap] += np.einsum("go,gi->goi", grad[row], x[source])
        return grad_x.reshape(self.rows, C), grad_weight

    def sums(self, first, second):
        """What a kernel leaves of each row and group: [rows, groups, 2], NaN outside the segments."""
        out = np.full((self.rows, GROUPS, 2), np.nan, dtype=np.float32)
        for start, count in self.segments:
            rows = slice(start, start + count)
            out[rows, :, 0], out[rows, :, 1] = (
                v.reshape(self.rows, GROUPS, WIDTH)[rows].sum(2) for v in (first, second)
            )
        return aligned(out)


def close(problem, got, want, tolerance=4e-3):
    got, want = problem.inside(got.astype(np.float64)), problem.inside(want)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1), np.abs(got - want).max()


def untouched(problem, values):
    """Nothing is written outside of the segments."""
    outside = np.ones(problem.rows, dtype=bool)
    for first, count in problem.segments:
        outside[first : first + count] = False
    assert np.isnan(values[outside]).all()


def statistics(z):
    z = z.astype(np.float64)
    return z.mean(1), 1 / np.sqrt(z.var(1) + EPS)


def forward(library, problem, activate):
    p = problem
    z, z_sums, weight = nans(p.rows, C, dtype=np.float16), nans(p.rows, GROUPS, 2), p.arranged(False)
    mean, rstd = statistics(p.x)
    grouped = p.x.astype(np.float64).reshape(p.rows, GROUPS, WIDTH)
    sums, stats = None, None
    if activate:
        spread = grouped.var(2) * WIDTH
        sums = aligned(np.stack([grouped.mean(2), spread], 2).astype(np.float32))
        stats = nans(2, p.rows)
    code = library.d2v_pos_conv_fwd(
        pointer(p.x), pointer(sums), pointer(stats), pointer(weight), pointer(p.bias), pointer(z),
        pointer(z_sums), ctypes.c_int64(activate), ctypes.c_double(EPS), ctypes.byref(p.shape), None,
    )  # fmt: skip
    assert code == 0
    source = gelu((p.x - mean[:, None]) * rstd[:, None]) if activate else p.x
    close(p, z, p.conv(source))
    got = z.astype(np.float64).reshape(p.rows, GROUPS, WIDTH)
    close(p, z_sums[:, :, 0], got.mean(2), 1e-5)
    close(p, z_sums[:, :, 1], got.var(2) * WIDTH, 1e-5)
    untouched(p, z)
    if activate:
        close(p, stats.T, np.stack([mean, rstd], 1), 1e-5)
        untouched(p, stats.T)


def dgrad(library, problem, through_norm, through_gelu):
    p = problem
    mean, rstd = statistics(p.x)  # x stands for z of this layer
    normed = (p.x - mean[:, None]) * rstd[:, None]
    grad = p.grad.astype(np.float64)
    grad_z, sums, stats, below_stats, below_y, out_sums = (None,) * 6
    if through_norm:
        sums = p.sums(grad, grad * normed)
        stats = aligned(np.stack([mean, rstd]).astype(np.float32))
        grad_z = nans(p.rows, C, dtype=np.float16)
        grad = rstd[:, None] * (grad - grad.mean(1)[:, None] - normed * (grad * normed).mean(1)[:, None])
    if through_gelu:
        below = statistics(p.below)
        below_stats = aligned(np.stack(below).astype(np.float32))
        below_y, out_sums = nans(p.rows, C, dtype=np.float16), nans(p.rows, GROUPS, 2)
    out, weight = nans(p.rows, C, dtype=np.float16), p.arranged(True)
    code = library.d2v_pos_conv_dgrad(
        pointer(p.grad), pointer(p.x if through_norm else None), pointer(stats), pointer(sums), pointer(grad_z),
        pointer(weight), pointer(p.below if through_gelu else None), pointer(below_stats), pointer(out),
        pointer(out_sums), pointer(below_y), ctypes.byref(p.shape), None,
    )  # fmt: skip
    assert code == 0
    want, _ = p.conv_grad(grad, p.x)
    if through_norm:
        close(p, grad_z, grad)
        untouched(p, grad_z)
    if through_gelu:
        u = (p.below - below[0][:, None]) * below[1][:, None]
        close(p, below_y, gelu(u))
        want = want * slope(u)
        got = out.astype(np.float64)
        for i, v in enumerate((got, got * u)):
            close(p, out_sums[:, :, i], v.reshape(p.rows, GROUPS, WIDTH).sum(2), 1e-5)
    close(p, out, want)
    untouched(p, out)


def wgrad(library, problem, shares):
    p = problem
    weight_shares, bias_shares = nans(shares, GROUPS, p.taps, WIDTH, WIDTH), nans(shares, C)
    grad_weight, grad_bias = nans(C, WIDTH, p.taps), nans(C)
    code = library.d2v_pos_conv_wgrad(
        pointer(p.grad), pointer(p.x), pointer(weight_shares), pointer(bias_shares), pointer(grad_weight),
        pointer(grad_bias), ctypes.c_int64(shares), ctypes.byref(p.shape), None,
    )  # fmt: skip
    assert code == 0
    _, want = p.conv_grad(p.grad, p.x)
    want = want.transpose(0, 2, 3, 1).reshape(grad_weight.shape)
    assert np.abs(grad_weight - want).max() < 1e-4
    assert np.abs(grad_bias - p.inside(p.grad.astype(np.float64)).sum(0)).max() < 1e-4


def bf16_in_whole_rows(library):
    """The other element type, no table of tiles, more than one tile: a convolution with the identity."""
    rows, frames = 2 * 259, 259
    x = aligned(np.random.default_rng(0).integers(0, 2**14, (rows, C)).astype(np.uint16))  # bf16 bits of finite numbers
    p = Problem(1, rows, [(0, frames), (frames, frames)])
    p.weight = np.broadcast_to(np.eye(WIDTH), (GROUPS, 1, WIDTH, WIDTH)) * 0x3F80  # bits of 1
    weight = aligned(p.arranged(False).astype(np.uint16))
    z = aligned(np.zeros_like(x))
    shape = Shape(rows, 4, frames, GROUPS, WIDTH, 1, 1, None)
    code = library.d2v_pos_conv_fwd(
        pointer(x), None, None, pointer(weight), None, pointer(z), None, ctypes.c_int64(0), ctypes.c_double(EPS),
        ctypes.byref(shape), None,
    )  # fmt: skip
    assert code == 0 and (z == x).all()


def unknown_width(library):
    shape = Shape(8, 1, 8, 2, 40, 3, 1, None)
    none = (None,) * 7
    assert library.d2v_pos_conv_fwd(*none, ctypes.c_int64(0), ctypes.c_double(EPS), ctypes.byref(shape), None) != 0


def cases(library):
    problems = {taps: Problem(taps) for taps in (1, 4, 12)}
    for taps, activate in ((1, 0), (4, 1), (12, 1)):
        yield f"pos_conv_fwd-{taps}-{activate}", lambda p=problems[taps], a=activate: forward(library, p, a)
    for taps, norm, inner in ((1, False, False), (4, True, False), (12, False, True), (4, True, True)):
        yield f"pos_conv_dgrad-{taps}-{norm}-{inner}", lambda p=problems[taps], a=norm, b=inner: dgrad(library, p, a, b)
    for taps, shares in ((1, 1), (12, 3)):
        yield f"pos_conv_wgrad-{taps}-{shares}", lambda p=problems[taps], s=shares: wgrad(library, p, s)
    yield "pos_conv-bf16", lambda: bf16_in_whole_rows(library)
    yield "pos_conv-unknown-width", lambda: unknown_width(library)
