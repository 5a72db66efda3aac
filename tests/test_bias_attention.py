"""bias_attention against float64: sizes, dtypes, lengths, masks, strides."""

import math

import pytest
import torch
import torch.nn.functional as F
from bias_attention_cases import KINDS, check_against_fp64, dropout_factor, eager, make_inputs, values_and_grads
from checks import DEVICE, RUNS_KERNELS, assert_as_accurate_as_eager

from d2v_fast.ops import bias_attention

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# B, T, H, D, keys: one position, below / at / above a tile of a GPU and of the interpreter, two tiles, no multiples
SIZES = [
    (2, 5, 3, 16, None),
    (1, 1, 2, 40, None),
    (3, 17, 1, 8, None),
    (2, 63, 2, 64, None),
    (1, 64, 2, 96, None),
    (2, 65, 1, 128, None),
    (1, 197, 2, 64, None),
    (1, 260, 1, 32, None),
    (2, 7, 2, 24, 130),
    (2, 130, 1, 1, 9),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_fp64(sizes, kind):
    *shape, keys = sizes
    check_against_fp64(*make_inputs(*shape, kind, Tk=keys), floor=4e-6)


@pytest.mark.parametrize("dtype,extra", [(BF16, F32), (BF16, BF16), (F16, F16), (F16, F32), (F32, BF16)])
@pytest.mark.parametrize("kind", ["bias", "slopes"])
def test_dtypes(dtype, extra, kind):
    check_against_fp64(*make_inputs(2, 70, 2, 32, kind, dtype, extra_dtype=extra), p=0.2, floor=4e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lengths(kind, p):
    """Of none, one and some keys, and beyond."""
    tensors, options = make_inputs(5, 140, 1, 16, kind)
    options["lengths"] = torch.tensor([0, 1, 64, 129, 999], device=DEVICE)
    tensors["v"] = tensors["v"].clone()
    tensors["v"][2, 64:] = math.nan  # nobody sees it
    upstream = torch.randn(tensors["q"].shape, device=DEVICE)
    factor = dropout_factor(5, 1, 140, 140, p, seed=3) if p else None
    torch.manual_seed(3)
    got = values_and_grads(bias_attention, upstream, tensors, p=p, **options)
    tensors["v"] = tensors["v"].nan_to_num()
    want = values_and_grads(
        eager, upstream, {name: x.double() for name, x in tensors.items()}, factor=factor, **options
    )
    for name, x in got.items():
        assert_as_accurate_as_eager(x, want[name].nan_to_num().float(), want[name].nan_to_num(), floor=2e-5)
    assert not got["o"][0].any() and not any(got[name][0].any() for name in "qkv")
    assert not got["k"][2, 64:].any() and not got["v"][2, 64:].any()


def test_lengths_are_a_shorter_batch():
    tensors, _ = make_inputs(1, 140, 2, 16, "plain")
    lengths = torch.tensor([77], dtype=torch.int32, device=DEVICE)
    short = {name: x if name == "q" else x[:, :77] for name, x in tensors.items()}
    torch.testing.assert_close(bias_attention(**tensors, lengths=lengths), bias_attention(**short))


def test_masked_pairs_of_a_bias():
    """-inf masks a pair, and a query whose pairs are all masked gets 0 and gives no gradient."""
    tensors, _ = make_inputs(2, 70, 2, 16)
    tensors["bias"][0, :, 3:40] = -math.inf
    tensors["bias"][1, 9] = -math.inf
    upstream = torch.randn(2, 70, 2, 16, device=DEVICE)
    got = values_and_grads(bias_attention, upstream, tensors)
    assert not got["o"][:, 9, 1].any() and not got["q"][:, 9, 1].any()
    assert not got["bias"][0, :, 3:40].any() and not got["bias"][1, 9].any()
    alone = {name: x[:, :, :1] for name, x in tensors.items() if name != "bias"}
    want = eager(**{name: x.double() for name, x in alone.items()}, bias=tensors["bias"][:1].double())
    torch.testing.assert_close(got["o"][:, :, :1].double(), want, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in got.values())


def test_large_logits():
    """A constant on all logits of a query changes nothing; exp of it would overflow."""
    tensors, _ = make_inputs(1, 70, 2, 16)
    moved = tensors["bias"] + torch.tensor([3e4, -3e4], device=DEVICE).view(2, 1, 1)
    got = values_and_grads(bias_attention, torch.randn(1, 70, 2, 16, device=DEVICE), tensors | {"bias": moved})
    torch.testing.assert_close(got["o"], bias_attention(**tensors), rtol=0, atol=1e-2)
    assert all(x.isfinite().all() for x in got.values())
    check_against_fp64(tensors | {"q": tensors["q"] * 100}, {}, floor=1e-4)


@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
def test_nan_reaches_who_sees_it(where):
    tensors, _ = make_inputs(2, 70, 2, 16)
    x = tensors[where] = tensors[where].clone()
    x[(1, 66) if where == "bias" else (1, 66, 0)] = math.nan
    got = values_and_grads(bias_attention, torch.randn(2, 70, 2, 16, device=DEVICE), tensors)
    seen = torch.zeros(2, 70, 2, dtype=torch.bool, device=DEVICE)
    if where == "bias":
        seen[:, 66, 1] = True  # a row of one head, in every sample
    elif where == "q":
        seen[1, 66, 0] = True
    else:
        seen[1, :, 0] = True
    assert torch.equal(got["o"].isnan().all(-1), seen) and torch.equal(got["o"].isnan().any(-1), seen)
    assert torch.equal(got["q"].isnan().any(-1), seen)
    for name in "kv":  # a query that is NaN reaches all keys of its head of its sample; values do not reach their own
        reached = seen.any(1) & (name != where or where != "v")
        assert torch.equal(got[name].isnan().any(-1).any(1), reached), name
    rows = got["bias"].isnan().any(-1)  # [H, Tq]
    assert torch.equal(rows, seen.any(0).T)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8, 5), (2, 0, 2, 8, 5), (2, 5, 2, 8, 0), (2, 5, 0, 8, 5)], ids=str)
def test_nothing_to_do(shape):
    *sizes, keys = shape
    for kind in KINDS:
        tensors, options = make_inputs(*sizes, kind, Tk=keys)
        got = values_and_grads(bias_attention, torch.randn(tensors["q"].shape), tensors, p=0.2, **options)
        assert got["o"].shape == tensors["q"].shape
        for name, x in got.items():
            assert x.shape == tensors.get(name, tensors["q"]).shape and not x.any(), (name, kind)


def test_gradient_of_a_shared_table():
    """Of relative positions, gathered once and used by two layers (BEiT)."""
    from d2v_fast.nn.positions import RelativePositionBias

    bias = RelativePositionBias(heads=2, grid=4).to(DEVICE)
    torch.nn.init.normal_(bias.table)
    tensors, _ = make_inputs(3, 17, 2, 16, "plain")
    upstream = torch.randn(3, 17, 2, 16, device=DEVICE)

    def layers(function, dtype):
        table = bias.table.detach().to(dtype).requires_grad_()
        gathered = F.embedding(bias.index, table).permute(2, 0, 1)
        q, k, v = (x.to(dtype) for x in tensors.values())
        out = function(q, k, function(q, k, v, gathered), gathered)
        return torch.autograd.grad(out, table, upstream.to(dtype))[0]

    assert_as_accurate_as_eager(layers(bias_attention, F32), layers(eager, F32), layers(eager, F64))
    torch.testing.assert_close(
        bias_attention(*tensors.values(), bias()), eager(*tensors.values(), bias()), rtol=1e-5, atol=1e-5
    )


def test_gradient_of_a_learned_alibi_scale():
    tensors, options = make_inputs(2, 70, 3, 16, "slopes")
    slopes, upstream = tensors.pop("slopes"), torch.randn(2, 70, 3, 16, device=DEVICE)

    def grad(function, dtype):
        scale = torch.full((3,), 1.5, device=DEVICE, dtype=dtype, requires_grad=True)
        out = function(*(x.to(dtype) for x in tensors.values()), slopes=slopes.to(dtype) * scale, **options)
        return torch.autograd.grad(out, scale, upstream.to(dtype))[0]

    assert_as_accurate_as_eager(grad(bias_attention, F32), grad(eager, F32), grad(eager, F64), floor=1e-5)


def test_positions_of_either_integer_and_far_apart():
    tensors, options = make_inputs(2, 20, 2, 16, "slopes")
    want = bias_attention(**tensors, **options)
    assert torch.equal(bias_attention(**tensors, positions=options["positions"].long()), want)
    moved = {"positions": options["positions"] + 2**23, "query_positions": options["positions"] + 2**23}
    torch.testing.assert_close(bias_attention(**tensors, **moved), want)


def test_scale():
    tensors, _ = make_inputs(2, 9, 2, 16)
    torch.testing.assert_close(bias_attention(**tensors, scale=0.7), eager(**tensors, scale=0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["heads first", "time first", "last dim strided", "wide rows", "broadcast"])
def test_strides(layout):
    B, T, H, D = 2, 21, 3, 16
    x = {
        "heads first": lambda: torch.randn(B, H, T, D).transpose(1, 2),
        "time first": lambda: torch.randn(T, B, H, D).transpose(0, 1),
        "last dim strided": lambda: torch.randn(B, T, D, H).transpose(2, 3),
        "wide rows": lambda: torch.randn(B, T + 3, H + 1, D + 5)[:, 1 : T + 1, :H, 3 : D + 3],
        "broadcast": lambda: torch.randn(1, T, 1, D).expand(B, T, H, D),
    }[layout]
    tensors = {name: x().to(DEVICE) for name in "qkv"} | {"bias": torch.randn(T, T, H, device=DEVICE).permute(2, 0, 1)}
    upstream = x().to(DEVICE)
    got, want = (values_and_grads(f, upstream, tensors) for f in (bias_attention, eager))
    assert got["o"].is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_padded_bias_is_read_in_place():
    from d2v_fast.kernels.bias_attention import align_bias

    wide = torch.full((2, 20, 32), math.nan, device=DEVICE)  # what lies behind the columns is not used
    bias = wide[..., :21].copy_(torch.randn(2, 20, 21))
    assert align_bias(bias).data_ptr() == wide.data_ptr()
    for other in (
        bias.contiguous(),
        wide[..., 1:22],
        wide[..., ::2],
        wide.flatten()[3:].as_strided(bias.shape, (640, 32, 1)),
    ):
        padded = align_bias(other)
        assert padded.data_ptr() != other.data_ptr() and padded.stride(1) % 16 == 0
        assert torch.equal(padded[..., : other.shape[2]].nan_to_num(), other.nan_to_num())
    tensors, _ = make_inputs(2, 20, 2, 16, "plain", Tk=21)
    upstream = torch.randn(2, 20, 2, 16, device=DEVICE)
    views = [values_and_grads(bias_attention, upstream, tensors | {"bias": b}) for b in (bias, bias.clone())]
    torch.testing.assert_close(*views, rtol=0, atol=0)
