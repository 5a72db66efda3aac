"""Bad arguments of the fused loss."""

import importlib

import pytest
import torch
from checks import DEVICE
from eager_targets import make_layers
from loss_cases import make_pred

from d2v_fast.ops import data2vec_loss

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda p, x, i: data2vec_loss(p, [], i), ValueError, "layer_results must hold at least one tensor"),
        (lambda p, x, i: data2vec_loss(p[:, :7], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(3, 7\)"),
        (lambda p, x, i: data2vec_loss(p[:2], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(2, 8\)"),
        (lambda p, x, i: data2vec_loss(p[0], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(8,\)"),
        (lambda p, x, i: data2vec_loss(p.int(), x, i), TypeError, "pred must be float32.*int32"),
        (lambda p, x, i: data2vec_loss(p.to("meta"), x, i), ValueError, "pred must be on .*, got meta"),
        (lambda p, x, i: data2vec_loss(p, [x[0], x[1].half()], i), TypeError, r"\[1\] must be torch.float32 .*float16"),
        (lambda p, x, i: data2vec_loss(p, [y[0] for y in x], i), ValueError, "layer_results must have 3 dims"),
        (lambda p, x, i: data2vec_loss(p, x, i.float()), TypeError, "positions must be int32 or int64, got .*float32"),
        (lambda p, x, i: data2vec_loss(p, x, i[None]), ValueError, r"positions must have shape \[N\], got \(1, 3\)"),
        (lambda p, x, i: data2vec_loss(p, x, i.to("meta")), ValueError, "positions must be on .*, got meta"),
        (lambda p, x, i: data2vec_loss(p, x, i, norm="group"), ValueError, "norm must be one of instance, .*'group'"),
        (lambda p, x, i: data2vec_loss(p, x, i, post_norm="batch"), ValueError, "post_norm must be one of"),
        (lambda p, x, i: data2vec_loss(p, x, i, layout="BCT"), ValueError, "layout must be one of BTC, TBC"),
        (lambda p, x, i: data2vec_loss(p, x, i, beta=-1.0), ValueError, "beta must be finite and >= 0, got -1.0"),
        (lambda p, x, i: data2vec_loss(p, x, i, scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda p, x, i: data2vec_loss(p, x, i, scale=float("inf")), ValueError, "scale must be finite, got inf"),
        (lambda p, x, i: data2vec_loss(None, x, i), TypeError, "pred must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, x, None), TypeError, "positions must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, [None], i), TypeError, r"layer_results\[0\] must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, x, i, lengths=[5] * 4), TypeError, "lengths must be a tensor, got list"),
        (lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=[0]), TypeError, "target_batch_index must be a ten"),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=i[:0]),
            ValueError,
            "target_batch_index must not be empty",
        ),
        (lambda p, x, i: data2vec_loss(p, x, i, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (lambda p, x, i: data2vec_loss(p, x, i, lengths=i.int()), ValueError, r"lengths must have shape \(4,\)"),
        (lambda p, x, i: data2vec_loss(p, [y[:, :1] for y in x], i), ValueError, "at least 2 frames, .* T = 1"),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=p),
            TypeError,
            "target_batch_index must be int32 or",
        ),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=i[None]),
            ValueError,
            r"\[B_student\], got \(1, 3\)",
        ),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(
            make_pred(3, 8),
            [torch.zeros(4, 5, 8, device=DEVICE) for _ in range(2)],
            torch.tensor([1, 2, 3], device=DEVICE),
        )


OUT_OF_RANGE = [
    ({"positions": [3, 10, 0]}, r"positions must lie in \[0, 9\], got values from 0 to 10"),
    ({"positions": [-1, 10, 3]}, r"positions must lie in \[0, 9\], got values from 3 to 10"),
    ({"positions": [3, 15, 0], "target_batch_index": [0, 1, 1]}, r"positions must lie in \[0, 14\], .* to 15"),
    ({"target_batch_index": [0, 2]}, r"target_batch_index must lie in \[0, 1\], got values from 0 to 2"),
    ({"lengths": [6, 2]}, r"lengths must lie in \[0, 5\], got values from 2 to 6"),
]


def call_out_of_range(wrong, **options):
    wrong = {k: torch.tensor(v, device=DEVICE) for k, v in wrong.items()}
    positions = wrong.pop("positions", torch.tensor([1, 2, 3], device=DEVICE))
    data2vec_loss(make_pred(3, 4), make_layers(1, 2, 5, 4), positions, **wrong, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot check without a synchronisation")
@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_indices_out_of_range_raise_on_cpu(wrong, match):
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong)


@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_check_looks_at_the_ranges_before_the_op_runs(wrong, match, monkeypatch):
    op = importlib.import_module("d2v_fast.ops.data2vec_loss")  # the package holds the function under this name
    monkeypatch.setattr(op, "_fwd", None)
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_check_raises_on_the_gpu(wrong, match):
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong, check=True)
