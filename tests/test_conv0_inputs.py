"""Bad arguments of the first convolution."""

import pytest
import torch

from d2v_fast.ops import conv0_norm_gelu

pytestmark = pytest.mark.usefixtures("poison")


S2 = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, w: conv0_norm_gelu([0.0], w, stride=1), TypeError, "waveforms must be a tensor, got list"),
        (lambda x, w: conv0_norm_gelu(x.int(), w, stride=1), TypeError, "waveforms must be float32.* got torch.int32"),
        (lambda x, w: conv0_norm_gelu(x, w.long(), stride=1), TypeError, "weight must be float32.* got torch.int64"),
        (
            lambda x, w: conv0_norm_gelu(x[0], w, stride=1),
            ValueError,
            r"waveforms must be \[B, S\] .* got shape \(30,\)",
        ),
        (lambda x, w: conv0_norm_gelu(x[:0], w, stride=1), ValueError, r"at least one row, got shape \(0, 30\)"),
        (
            lambda x, w: conv0_norm_gelu(x[:, :9], w, stride=1),
            ValueError,
            "waveforms must have at least 10 samples, got 9",
        ),
        (
            lambda x, w: conv0_norm_gelu(x, w[:, 0], stride=1),
            ValueError,
            r"weight must be \[C, 1, k\], got .* \(8, 10\)",
        ),
        (lambda x, w: conv0_norm_gelu(x, w[:0], stride=1), ValueError, r"weight must be .* got shape \(0, 1, 10\)"),
        (lambda x, w: conv0_norm_gelu(x, w.to("meta"), stride=1), ValueError, "weight must be on .*, got meta"),
        (lambda x, w: conv0_norm_gelu(x, w, w, stride=1), ValueError, r"bias must have shape \(8,\), got \(8, 1, 10\)"),
        (lambda x, w: conv0_norm_gelu(x, w, None, 1.0, stride=1), TypeError, "norm_weight must be a tensor, got float"),
        (
            lambda x, w: conv0_norm_gelu(x, w, None, None, x[0], stride=1),
            ValueError,
            r"norm_bias must have shape \(8,\)",
        ),
        (lambda x, w: conv0_norm_gelu(x, w, stride=0), ValueError, "stride must be > 0, got 0"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1.5), TypeError, "stride must be an integer, got float"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=True), TypeError, "stride must be an integer, got bool"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, norm="batch"), ValueError, "norm must be .* got 'batch'"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (
            lambda x, w: conv0_norm_gelu(x, w, stride=1, dtype=torch.int8),
            TypeError,
            "dtype must be float32.* torch.int8",
        ),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, dtype="bf16"), TypeError, "dtype must be a torch.dtype, got str"),
        (lambda x, w: segmented(x, w, S2.float()), TypeError, "segments must be int32 or int64, got torch.float32"),
        (lambda x, w: segmented(x, w, [[0, 1]]), TypeError, "segments must be a tensor, got list"),
        (lambda x, w: segmented(x, w, S2[0]), ValueError, r"segments must be \[U, 2\], got shape \(2,\)"),
        (lambda x, w: segmented(x, w, [[0, 2], [40, 3]]), ValueError, r"rows of 21 frames, got \[40, 3\]"),
        (lambda x, w: segmented(x, w, [[-1, 2]]), ValueError, r"rows of 21 frames, got \[-1, 2\]"),
        (lambda x, w: segmented(x, w, [[3, -1]]), ValueError, r"rows of 21 frames, got \[3, -1\]"),
        (lambda x, w: segmented(x, w, [[20, 2]]), ValueError, r"rows of 21 frames, got \[20, 2\]"),
        (lambda x, w: segmented(x, w, [[7, 3], [0, 8]]), ValueError, "segments must not overlap, got frame 7 in two"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2, 30), torch.zeros(8, 1, 10))


def segmented(x, w, segments):
    rows = isinstance(segments, list) and len(segments[0]) == 2 and segments != [[0, 1]]
    return conv0_norm_gelu(x, w, stride=1, norm="group", segments=torch.tensor(segments) if rows else segments)
