"""The speech front-end: frames of each clip alone, in a batch and packed; gradients, memory, precision, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, assert_as_accurate_as_eager, no_synchronisation
from eager_frontend import LENGTHS, assert_as_accurate, eager, padded_batch, relative, saved_bytes
from tiny import tiny_config
from torch import nn

from d2v_fast.nn import PackedWaveforms, SpeechFrontEnd, pack_waveforms
from d2v_fast.nn.config import SpeechFrontEndConfig
from d2v_fast.ops import _conv0_extension, _rows

F32, BF16 = torch.float32, torch.bfloat16
WIDTH = 24
PUBLISHED = SpeechFrontEndConfig()
NARROW = tuple((WIDTH, kernel, stride) for _, kernel, stride in PUBLISHED.conv_layers)


def front(dtype=F32, **changes):
    """A front-end with no parameter at a trivial value."""
    config = tiny_config("speech")
    frontend = SpeechFrontEnd(replace(config.frontend, **{"conv_layers": NARROW, **changes}), config.encoder)
    with torch.no_grad():
        for p in frontend.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return frontend.to(DEVICE, dtype)


def clips(lengths=LENGTHS, dtype=F32):
    return [torch.randn(n).to(DEVICE, dtype) for n in lengths]


def run(frontend, function, upstream):
    """The function's value, and the gradient of every parameter of the front-end that has one."""
    frontend.zero_grad()
    y = function()
    y.backward(upstream.to(y))
    return [y.detach(), *(p.grad.clone() for p in frontend.parameters() if p.grad is not None)]


def assert_close(got, want, tolerance=1e-5):
    """The difference is at most ``tolerance`` of the size."""
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and relative(g, w) <= tolerance, relative(g, w)


def compare(got, single, exact):
    """Low precision: the error against float64 is at most twice that of PyTorch's own operators."""
    errors, of_eager = ([relative(v.cpu(), w) for v, w in zip(side, exact, strict=True)] for side in (got, single))
    assert_as_accurate(errors, of_eager)


MODES = [("layer", False), ("layer", True), ("group", False), ("group", True)]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("norm", "bias"), MODES)
def test_matches_eager(norm, bias, B):
    """Values and the gradient of every parameter."""
    frontend = front(conv_norm=norm, conv_bias=bias)
    waves = torch.randn(B, 2777, device=DEVICE)
    upstream = torch.randn(B, PUBLISHED.num_frames(2777), 32, device=DEVICE)
    got = run(frontend, lambda: frontend.features(waves), upstream)
    want = run(frontend, lambda: eager(frontend, waves), upstream)
    if norm == "group" and bias:  # a group norm takes the bias away: its gradient is 0, eager's is rounding
        index = 1 + [n for n, p in frontend.named_parameters() if p.grad is not None].index("convs.0.conv.bias")
        assert not got.pop(index).any()
        want.pop(index)
    assert_close(got, want)


@pytest.mark.parametrize(("norm", "bias"), MODES)
@pytest.mark.parametrize("form", ["padded batch", "sequence"])
def test_ragged_equals_each_alone(form, norm, bias):
    """Values, zeros behind them, and the sum of the gradients."""
    frontend, waves = front(conv_norm=norm, conv_bias=bias), clips()
    frames = [PUBLISHED.num_frames(n) for n in LENGTHS]
    upstream = torch.randn(len(waves), max(frames), 32, device=DEVICE)
    valid = torch.arange(max(frames))[None] < torch.tensor(frames)[:, None]

    def alone():
        rows = [frontend.features(w[None])[0] for w in waves]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def together():
        if form == "padded batch":
            return frontend.features(*padded_batch(waves))
        packed = pack_waveforms(waves, frontend.config)
        return packed.padded(frontend.packed_features(packed))

    got = run(frontend, together, upstream)
    assert not got[0][~valid].any()
    assert_close(got, run(frontend, alone, upstream))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_neighbours_do_not_matter(norm):
    """To the last bit: the rows of a matrix product do not see each other."""
    frontend = front(conv_norm=norm)
    waves = clips()
    packed = pack_waveforms(waves, frontend.config)
    loud = pack_waveforms([w if i == 2 else 100 * w + 3 for i, w in enumerate(waves)], frontend.config)
    a, b = (p.padded(frontend.packed_features(p)) for p in (packed, loud))
    assert torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])


def test_packed_valid_rows():
    frontend, waves = front(), clips()
    packed = pack_waveforms(waves, frontend.config)
    frames = frontend.packed_features(packed)
    valid = packed.valid(frames)
    assert valid.shape == (sum(packed.num_frames), 32)
    batch = packed.padded(frames)
    rows = torch.cat([row[:count] for row, count in zip(batch, packed.num_frames, strict=True)])
    assert torch.equal(valid, rows)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_no_frames_between_products(norm):
    """A stack whose strides are longer than its kernels, where samples go unread."""
    frontend = front(conv_layers=((8, 5, 7), (8, 2, 3), (8, 1, 1)), conv_norm=norm)
    waves = clips([100, 33, 26])
    got = frontend.features(*padded_batch(waves))
    for row, wave in zip(got, waves, strict=True):
        want = frontend.features(wave[None])[0]
        torch.testing.assert_close(row[: len(want)], want)
        torch.testing.assert_close(want, eager(frontend, wave[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_autocast(norm):
    """bfloat16: error against float64 at most twice that of PyTorch's own operators."""
    frontend, waves = front(conv_norm=norm), torch.randn(2, 4001, device=DEVICE)
    upstream = torch.randn(2, 12, 32, device=DEVICE)
    with torch.autocast(DEVICE, BF16):
        got = run(frontend, lambda: frontend.features(waves), upstream)
        single = run(frontend, lambda: eager(frontend, waves), upstream)
    assert got[0].dtype == BF16
    exact = front(torch.float64, conv_norm=norm).cpu()
    exact.load_state_dict(frontend.state_dict())
    want = run(exact, lambda: eager(exact, waves.double().cpu()), upstream.cpu())
    compare(got, single, want)


@pytest.mark.skipif(INTERPRET, reason="emulated kernels are tested without Triton's interpreter")
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_kernels_of_the_extension_on_the_lattice(norm, emulated, monkeypatch):
    """What a GPU runs: bfloat16, ragged, against float64; the segments of the lattice in the kernels' hands."""
    ran = []
    for way in ("forward", "backward"):
        real = getattr(_conv0_extension, way)
        monkeypatch.setattr(_conv0_extension, way, lambda *a, f=real, way=way: ran.append(way) or f(*a))
    frontend = front(conv_norm=norm, conv_layers=((64, 10, 5), *NARROW[1:]))
    waves = clips([4000, 400, 2719])
    upstream = torch.randn(3, 12, 32)

    def alone(frontend, dtype=F32):
        rows = [eager(frontend, w[None].to(dtype))[0] for w in waves]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    for row, frames in zip(upstream, [12, 1, 8], strict=True):
        row[frames:] = 0  # eager code has no frames there, and its projection a bias
    with torch.autocast("cpu", BF16):
        got = run(frontend, lambda: frontend.features(*padded_batch(waves)), upstream)
        single = run(frontend, lambda: alone(frontend), upstream)
    assert ran == ["forward", "backward"]
    frontend.double()
    want = run(frontend, lambda: alone(frontend, torch.float64), upstream)
    compare(got, single, want)


def test_low_precision_weights():
    frontend = front(BF16)
    waves = torch.randn(2, 1500).to(DEVICE, BF16)
    got = frontend.features(waves)
    exact = front(torch.float64).cpu()
    exact.load_state_dict(frontend.state_dict())
    assert got.dtype == BF16
    assert_as_accurate_as_eager(got, eager(frontend, waves), eager(exact, waves.double().cpu()))


@pytest.mark.parametrize("precision", [F32, BF16])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_memory_is_what_the_docstring_says(norm, precision, monkeypatch):
    monkeypatch.setattr(_rows, "runs_reference", lambda *_: False)  # as on a GPU
    frontend = front(conv_norm=norm)
    waves = pack_waveforms(clips(), PUBLISHED)
    with torch.autocast(DEVICE, BF16, enabled=precision == BF16):
        got, _ = saved_bytes(frontend, lambda: frontend.convolve(waves))
    L, U, k, element = waves.samples.shape[1], len(waves.lengths), 10, precision.itemsize
    T = [SpeechFrontEndConfig(conv_layers=NARROW[: i + 1]).num_frames(L) for i in range(7)]
    want = 4 * L + sum(element * WIDTH * t for t in T[:-1])
    if norm == "layer":
        want += 4 * T[0] + sum((element * WIDTH + 8) * t for t in T[1:])
    else:
        want += 8 * U * (k + k * k) + sum(element * WIDTH * t for t in T[1:]) + 16 * U  # the segments themselves
    assert got == want


@pytest.mark.parametrize(("norm", "precision"), [("layer", F32), ("layer", BF16), ("group", BF16)])
def test_keeps_at_most_60_percent_of_eager(norm, precision, monkeypatch):
    """bfloat16: eager code as fairseq writes it, with norms in float32."""
    monkeypatch.setattr(_rows, "runs_reference", lambda *_: False)
    frontend, waves = front(conv_norm=norm), torch.randn(2, 3201, device=DEVICE)

    def released():
        x = waves[:, None]
        for layer in frontend.convs:
            x = F.conv1d(x, layer.conv.weight, None, layer.conv.stride)
            if layer.norm is not None:
                last = isinstance(layer.norm, nn.LayerNorm)
                y = (x.mT if last else x).float()
                y = layer.norm(y).type_as(x)
                x = y.mT if last else y
            x = F.gelu(x)
        return x

    with torch.autocast(DEVICE, BF16, enabled=precision == BF16):
        ours, _ = saved_bytes(frontend, lambda: frontend.convolve(waves))
        theirs, _ = saved_bytes(frontend, released)
    assert ours <= 0.6 * theirs, ours / theirs


def test_frozen_convolutions_keep_nothing():
    frontend = front(feature_grad_mult=0.0)
    waves = torch.randn(2, 1500, device=DEVICE)
    x = frontend.convolve(waves[:1])
    assert not x.requires_grad
    y = frontend.features(waves)
    y.sum().backward()
    assert all(p.grad is None for p in frontend.convs.parameters()) and frontend.norm.weight.grad is not None


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_gradient_factor_leaves_values(factor):
    scaled = front(feature_grad_mult=factor)
    plain = front()
    plain.load_state_dict(scaled.state_dict())
    waves, upstream = torch.randn(2, 1500, device=DEVICE), torch.randn(2, 4, 32, device=DEVICE)
    a, b = (run(f, lambda f=f: f.features(waves), upstream) for f in (scaled, plain))
    assert torch.equal(a[0], b[0])
    names = [name for name, p in scaled.named_parameters() if p.grad is not None]
    for name, g, w in zip(names, a[1:], b[1:], strict=True):
        assert_close([g], [factor * w if name.startswith("convs") else w])


def test_gradient_of_the_waveforms():
    """For attribution and the like; the batch lies in a row, so it passes through the lattice as well."""
    frontend = front()
    waves, upstream = torch.randn(2, 1500, device=DEVICE), torch.randn(2, 4, 32, device=DEVICE)
    got, want = (
        torch.autograd.grad(f(w), w, upstream)[0]
        for f, w in ((f, waves.clone().requires_grad_()) for f in (frontend.features, lambda w: eager(frontend, w)))
    )
    assert_close([got], [want])


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_compile_fullgraph(norm):
    frontend = front(conv_norm=norm, conv_layers=(NARROW[0], NARROW[1], NARROW[5]), feature_grad_mult=0.5)
    waves = torch.randn(2, 150, device=DEVICE)
    packed = pack_waveforms(clips([150, 80]), frontend.config)
    upstream = torch.randn(2, frontend.config.num_frames(150), 32, device=DEVICE)

    def from_packed(packed: PackedWaveforms):
        return packed.padded(frontend.packed_features(packed))

    for function, argument, dynamic in (
        (frontend.features, waves, None), (frontend.features, waves, True), (from_packed, packed, None)
    ):  # fmt: skip
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        got = run(frontend, lambda c=compiled, a=argument: c(a), upstream)
        assert_close(got, run(frontend, lambda f=function, a=argument: f(a), upstream))


def test_names_of_parameters():
    """Checkpoints depend on them."""
    names = {f"convs.{i}.{kind}.{p}" for i in range(7) for kind in ("conv", "norm") for p in ("weight", "bias")}
    others = {"norm.weight", "norm.bias", "proj.weight", "proj.bias", "mask_embedding"}
    assert set(front(conv_bias=True).state_dict()) == names | others
    group = front(conv_norm="group").state_dict()
    assert {n for n in group if ".norm." in n} == {"convs.0.norm.weight", "convs.0.norm.bias"}


def test_output_lengths():
    frontend = front()
    lengths = torch.tensor([1, 399, 400, 16_000, 320_000], dtype=torch.int32, device=DEVICE)
    got = frontend.output_lengths(lengths)
    assert got.dtype == torch.int64 and got.tolist() == [0, 0, 1, 49, 999]
    assert frontend.output_lengths([400, 720]).tolist() == [1, 2]
    with pytest.raises(TypeError, match=r"lengths must be integers, got torch.float32"):
        frontend.output_lengths(torch.ones(2))


def test_accepts_lengths_of_any_kind_on_the_host():
    frontend = front()
    batch, lengths = padded_batch(clips())
    want = frontend.features(batch, lengths)
    for kind in (tuple(lengths), np.array(lengths, np.int32), torch.tensor(lengths)):
        assert torch.equal(frontend.features(batch, kind), want)


NAN = float("nan")


def bad_sample(value):
    waves = torch.zeros(2, 900)
    waves[1, 37] = value
    return waves


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f, w: f.features([0.0]), TypeError, "waveforms must be a tensor, got list"),
        (lambda f, w: f.packed_features(w), TypeError, "packed must be PackedWaveforms, got Tensor"),
        (
            lambda f, w: f.packed_features(pack_waveforms(w, SpeechFrontEndConfig(conv_layers=((8, 10, 5),)))),
            ValueError,
            r"packed must be made for convolutions of .* \(2, 2\)\), got \(\(10, 5\),\)",
        ),
        (lambda f, w: f.features(w[0]), ValueError, r"waveforms must be \[B, S\] .* got \(900,\)"),
        (lambda f, w: f.features(w[:0]), ValueError, r"waveforms must be \[B, S\] with at least one row, got \(0, 900"),
        (lambda f, w: f.features(w[:, :399]), ValueError, "waveforms must have at least 400 samples, got 399"),
        (lambda f, w: f.features(w.double()), TypeError, "waveforms must be torch.float32, .* got torch.float64"),
        (lambda f, w: f.features(w.short()), TypeError, "waveforms must be torch.float32, .* got torch.int16"),
        (lambda f, w: f.features(bad_sample(NAN)), ValueError, r"waveforms must be finite, got 1 .* at \[1, 37\]"),
        (lambda f, w: f.features(bad_sample(-torch.inf)), ValueError, "waveforms must be finite, got 1 samples"),
        (
            lambda f, w: f.features(w, sample_rate=8000),
            ValueError,
            "sample_rate must be the model's 16000 Hz, got 8000",
        ),
        (lambda f, w: f.features(w, [900]), ValueError, r"lengths must be \[2\], one for each waveform, .* \(1,\)"),
        (
            lambda f, w: f.features(w, [900, 901]),
            ValueError,
            r"lengths must be in 1..900 samples, got 901 for waveform 1",
        ),
        (
            lambda f, w: f.features(w, [-1, 900]),
            ValueError,
            r"lengths must be in 1..900 samples, got -1 for waveform 0",
        ),
        (lambda f, w: f.features(w, [900, 300]), ValueError, r"waveforms\[1\] must have at least 400 .* got 300"),
        (lambda f, w: f.features(w, [900.0, 800.0]), TypeError, "lengths must be integers, got float64"),
        (
            lambda f, w: f.features(w, torch.ones(2, device="meta")),
            ValueError,
            "lengths must be on the CPU, .* got meta",
        ),
        (lambda f, w: f.features(bad_sample(NAN), [800, 800]), ValueError, "samples must be finite, got 1"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(front().cpu(), torch.zeros(2, 900))


@pytest.mark.gpu
def test_samples_on_a_gpu_are_looked_at_on_request():
    frontend, waves = front(), bad_sample(NAN).to(DEVICE)
    frontend.features(waves)
    with pytest.raises(ValueError, match="waveforms must be finite"):
        frontend.features(waves, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_does_not_wait_for_the_device(norm):
    frontend, waves = front(conv_norm=norm), torch.randn(2, 4000, device=DEVICE)
    packed = pack_waveforms([w.cpu() for w in clips()], PUBLISHED).pin_memory().to(DEVICE)

    def step():
        with torch.autocast(DEVICE, BF16):
            loss = frontend.features(waves).float().sum()
            loss = loss + packed.padded(frontend.packed_features(packed)).float().sum()
        loss.backward()

    step()
    with no_synchronisation():
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_captured_graph_reads_the_samples_again(norm):
    frontend = front(conv_norm=norm)
    packed = pack_waveforms(clips(), PUBLISHED, budget=16_000)
    parameters = list(frontend.parameters())[1:]  # without the mask embedding

    def step():
        frames = frontend.packed_features(packed)
        return [frames, *torch.autograd.grad(packed.valid(frames).square().sum(), parameters)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    packed.samples.copy_(torch.randn_like(packed.samples))
    graph.replay()
    torch.testing.assert_close(got, step())
