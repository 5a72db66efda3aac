"""Waveforms in one row, and what is checked and computed before: where each lies, guard frames, normalisation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE
from eager_frontend import LENGTHS, padded_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.nn import normalise, pack_waveforms
from d2v_fast.nn.config import SpeechFrontEndConfig
from d2v_fast.nn.frontends.lattice import lay_rows

PUBLISHED = SpeechFrontEndConfig()


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    layers=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3),
    extra=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    spare=st.integers(0, 50),
)
def test_where_waveforms_lie(layers, extra, spare):
    """Any stack of convolutions, followed by index arithmetic: frame t of a waveform sees what it would see alone."""
    config = replace(PUBLISHED, conv_layers=tuple((1, kernel, stride) for kernel, stride in layers))
    sizes = [config.min_samples + n for n in extra]
    waves = [torch.arange(n, dtype=torch.float64) + 1000 * (i + 1) for i, n in enumerate(sizes)]
    packed = pack_waveforms(waves, config)
    stride, total = config.total_stride, packed.samples.shape[1]
    M = config.num_frames(total)
    assert packed.lengths == tuple(sizes) and all(offset % stride == 0 for offset in packed.offsets)
    for u, (wave, offset) in enumerate(zip(waves, packed.offsets, strict=True)):
        assert torch.equal(packed.samples[0, offset : offset + len(wave)], wave)
        first, count = packed.segments[u].tolist()
        assert (first, count) == (offset // stride, config.num_frames(len(wave)))
        ends = [(first + t) * stride + config.min_samples for t in range(count)]
        assert first * stride == offset and ends[-1] <= offset + len(wave) and first + count <= M
        slots = packed.offsets[u + 1] // stride - first if u + 1 < len(waves) else M - first
        receptive = -(-config.min_samples // stride)  # guards between waveforms; two in the published stack
        assert 0 <= slots - count <= receptive
        _, kernel, conv_stride = config.conv_layers[0]
        assert packed.conv_segments[u].tolist() == [offset // conv_stride, (len(wave) - kernel) // conv_stride + 1]
    fixed = pack_waveforms(waves, config, budget=total + spare)
    assert fixed.samples.shape == (1, total + spare) and not fixed.samples[0, total:].any()
    assert torch.equal(fixed.rows, packed.rows)


@pytest.mark.parametrize(("S", "slots"), [(960, 3), (961, 4)])
def test_rows_of_equal_length_waste_nothing(S, slots):
    row = lay_rows(torch.ones(2, S), PUBLISHED)
    assert row.shape == (1, 2 * slots * 320 + 80) and PUBLISHED.num_frames(row.shape[1]) == 2 * slots
    assert row.sum() == 2 * S and row[0, slots * 320 :][:S].all()


def test_guard_frames_of_the_published_stack():
    for size in range(400, 1100):
        packed = pack_waveforms([torch.zeros(size), torch.zeros(400)], PUBLISHED)
        assert 1 <= packed.offsets[1] // 320 - packed.num_frames[0] <= 2


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_normalise(shift):
    waves = [shift + 0.01 * (i + 1) * torch.randn(n) for i, n in enumerate(LENGTHS)]
    batch, lengths = padded_batch([w.to(DEVICE) for w in waves])
    got = normalise(batch, lengths)
    audio = pytest.importorskip("d2v_fast.train.data.audio", exc_type=ImportError)
    for row, wave, n in zip(got, waves, lengths, strict=True):
        want = F.layer_norm(wave.double(), (n,)).float()
        torch.testing.assert_close(row[:n].cpu(), want)
        torch.testing.assert_close(row[:n].cpu(), torch.from_numpy(audio.normalize_waveform(wave.numpy())))
        assert not row[n:].any()
        assert torch.equal(normalise(wave.to(DEVICE)), row[:n])
    assert not normalise(torch.full((2, 50), 0.3)).any()  # silence stays silence


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda w: pack_waveforms([], PUBLISHED), ValueError, "waveforms must have at least one waveform, got none"),
        (lambda w: pack_waveforms(w[:0], PUBLISHED), ValueError, "waveforms must be .* with at least one row"),
        (lambda w: pack_waveforms([w], PUBLISHED), ValueError, r"waveforms\[0\] must be \[S\], got shape \(2, 900\)"),
        (lambda w: pack_waveforms([w[0], [1.0]], PUBLISHED), TypeError, r"waveforms\[1\] must be a tensor, got list"),
        (lambda w: pack_waveforms([w[0], w[1].half()], PUBLISHED), TypeError, r"waveforms\[1\] .* got torch.float16"),
        (lambda w: pack_waveforms([w[0].int()], PUBLISHED), TypeError, r"waveforms\[0\] must be floating point"),
        (lambda w: pack_waveforms([w[0], w[1].to("meta")], PUBLISHED), ValueError, r"waveforms\[1\] must be on cpu"),
        (lambda w: pack_waveforms([w[0], w[1, :399]], PUBLISHED), ValueError, r"waveforms\[1\] .* got 399"),
        (lambda w: pack_waveforms([w[0]], PUBLISHED, [900]), ValueError, "lengths must be None with a sequence"),
        (lambda w: pack_waveforms(w, PUBLISHED, budget=1999), ValueError, "budget must be at least the 2000 samples"),
        (lambda w: pack_waveforms(w, PUBLISHED, budget=3000.5), TypeError, "budget must be an integer, got float"),
        (lambda w: pack_waveforms(None, PUBLISHED), TypeError, "waveforms must be a tensor or .* got NoneType"),
        (lambda w: normalise([1.0]), TypeError, "waveforms must be a tensor, got list"),
        (lambda w: normalise(w.int()), TypeError, "waveforms must be floating point, got torch.int32"),
        (lambda w: normalise(w[None]), ValueError, r"waveforms must be .* got shape \(1, 2, 900\)"),
        (lambda w: normalise(w[:, :0]), ValueError, r"waveforms must be .* none 0, got shape \(2, 0\)"),
        (lambda w: normalise(w, [0, 900]), ValueError, r"lengths must be in 1..900 samples, got 0"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2, 900))
