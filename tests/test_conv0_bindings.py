"""The bindings of csrc/conv0.h refuse whatever the kernels would read or write wrongly."""

import pytest
import torch

from d2v_fast.ops import _conv0_extension

pytestmark = pytest.mark.usefixtures("poison")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def test_kernels_take_what_fits(emulated):
    def fits(C, k, dtype, of=F32):
        return _conv0_extension.fits(torch.zeros(1, 99, dtype=of), torch.zeros(C, 1, k, dtype=of), dtype)

    assert fits(64, 10, BF16) and fits(512, 16, F16) and fits(64, 1, BF16, BF16)
    assert not fits(96, 10, BF16) and not fits(64, 17, BF16) and not fits(64, 10, F32) and not fits(64, 10, BF16, F64)


def call_bindings(way="fwd", **changes):
    """conv0_fwd_cuda or conv0_bwd_cuda with group norm of two segments, and what is changed."""
    f16, f64 = {"dtype": F16}, {"dtype": F64}
    memory = {
        "y": torch.empty(2, 20, 64, **f16),
        "stats": torch.zeros(2, 110, **f64),
        "waveforms": torch.zeros(2, 105),
        "weight": torch.zeros(64, 10),
        "bias": None,
        "norm_weight": None,
        "norm_bias": None,
        "segments": torch.tensor([[0, 3], [20, 9]]),
        "table": torch.zeros(3, 4, dtype=torch.long),
        "stride": 5,
        "programs": 2,
        "folded": torch.empty(2, 2, 64, 16, dtype=BF16),
        "means": torch.empty(2, 10),
        "scratch": torch.empty(2, 3, 66, **f64),
        "grads": torch.empty(64, 13),
        "outer": torch.empty(3, 64, 16),
        "outer_sum": torch.empty(2, 64, 16),
        "inner": torch.empty(0, 1, 16, 16),
        "inner_sum": torch.empty(16, 16),
    }
    y, stats, *tensors, stride, programs, folded, means, scratch, grads, outer, outer_sum, inner, inner_sum = (
        memory | changes
    ).values()
    settings = (stride, 1e-5, False, programs)
    ops = torch.ops.d2v_fast_emulated
    if way == "fwd":
        ops.conv0_fwd_cuda(*tensors, *settings, y, stats, folded, means, scratch)
    else:
        sums = (outer, outer_sum, inner, inner_sum)
        ops.conv0_bwd_cuda(y, stats, *tensors, *settings, grads, folded, means, scratch, *sums)


@pytest.mark.parametrize(
    "way,changes,message",
    [
        ("fwd", {"waveforms": torch.zeros(2, 105, dtype=F64)}, "waveforms must be float32, got float64"),
        ("fwd", {"waveforms": torch.zeros(105, 2).mT}, "waveforms must be contiguous in its last dimension"),
        ("fwd", {"waveforms": torch.zeros(2, 9)}, "waveforms must have rows of at least as many samples"),
        ("fwd", {"weight": torch.zeros(96, 10)}, "weight must have a multiple of 64 channels, got 96"),
        ("fwd", {"weight": torch.zeros(64, 17)}, "weight must have 1 to 16 taps, got 17"),
        ("fwd", {"bias": torch.zeros(65)}, r"bias must have shape \[64\], got \[65\]"),
        ("fwd", {"norm_weight": torch.zeros(64, dtype=F64)}, "norm_weight must be float32, got float64"),
        ("fwd", {"norm_bias": torch.zeros(128)[::2]}, "norm_bias must be contiguous"),
        ("fwd", {"stride": 0}, "stride must be positive"),
        ("fwd", {"programs": 0}, "programs must be positive"),
        ("fwd", {"y": torch.zeros(2, 20, 64)}, "y must be bfloat16 or float16, got float32"),
        ("fwd", {"y": torch.zeros(2, 21, 64, dtype=F16)}, r"y must have shape \[2, 20, 64\], got \[2, 21, 64\]"),
        ("fwd", {"y": torch.zeros(2561, dtype=F16)[1:].view(2, 20, 64)}, "y must start at a multiple of 16 bytes"),
        ("fwd", {"segments": torch.zeros(2, 3, dtype=torch.long)}, r"segments must have shape \[2, 2\]"),
        ("fwd", {"segments": torch.zeros(2, 2, dtype=torch.int)}, "segments must be int64, got int32"),
        ("fwd", {"table": None}, "segment_table must come with segments"),
        ("fwd", {"table": torch.zeros(2, 4, dtype=torch.long)}, r"segment_table must have shape \[3, 4\]"),
        ("fwd", {"stats": torch.zeros(2, 109, dtype=F64)}, r"stats must have shape \[2, 110\], got \[2, 109\]"),
        ("fwd", {"folded": torch.empty(1, 2, 64, 16, dtype=BF16)}, r"folded must have shape \[2, 2, 64, 16\]"),
        ("fwd", {"means": torch.empty(2, 9)}, r"table must have shape \[2, 10\], got \[2, 9\]"),
        ("fwd", {"scratch": torch.empty(2, 3, 65, dtype=F64)}, r"scratch must have shape \[2, \*, 66\]"),
        ("bwd", {"grads": torch.empty(64, 12)}, r"grads must have shape \[64, 13\], got \[64, 12\]"),
        ("bwd", {"outer": torch.empty(2, 64, 16)}, r"outer must have shape \[3, 64, 16\], got \[2, 64, 16\]"),
        ("bwd", {"outer_sum": torch.empty(1, 64, 16)}, r"outer_sum must have shape \[2, 64, 16\]"),
        ("bwd", {"inner": torch.empty(1, 1, 16, 16)}, r"inner must have shape \[0, 1, 16, 16\]"),
        ("bwd", {"inner_sum": torch.empty(16, 15)}, r"inner_sum must have shape \[16, 16\], got \[16, 15\]"),
        ("bwd", {"stats": torch.zeros(2, 110)}, "stats must be float64, got float32"),
    ],
)
def test_bindings_check_their_arguments(way, changes, message, emulated):
    call_bindings(way)
    with pytest.raises(RuntimeError, match=message):
        call_bindings(way, **changes)
