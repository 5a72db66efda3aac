import math

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation

from d2v_fast.ops import bias_attention
from d2v_fast.ops.bias_attention import _bwd, _fwd, bias_attention_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS = ("bias", "slopes", "plain")


def make_inputs(B, T, H, D, kind="bias", dtype=F32, Tk=None, extra_dtype=F32):
    """Tensors that get a gradient, q, k, v first, and what goes with them; q, k, v are slices of one if they can be."""
    if Tk is None:
        q, k, v = torch.randn(B, T, 3, H, D).to(DEVICE, dtype).unbind(2)
    else:
        q, (k, v) = torch.randn(B, T, H, D).to(DEVICE, dtype), torch.randn(2, B, Tk, H, D).to(DEVICE, dtype)
    keys = T if Tk is None else Tk
    tensors, options = {"q": q, "k": k, "v": v}, {}
    if kind == "bias":
        tensors["bias"] = torch.randn(H, T, keys).to(DEVICE, extra_dtype)
    if kind == "slopes":
        tensors["slopes"] = (0.1 * torch.rand(H)).to(DEVICE, extra_dtype)
        options["positions"] = torch.rand(B, 2 * keys).argsort(1)[:, :keys].int().to(DEVICE)
        if Tk is not None:
            options["query_positions"] = torch.randint(2 * keys + 1, (B, T)).to(DEVICE)
    return tensors, options


def eager(
    q, k, v, bias=None, slopes=None, *, positions=None, query_positions=None, lengths=None, factor=None, scale=None
):
    """Independent of the op's reference: BEiT's attention with the given dropout ``factor``, in the inputs' dtype."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if slopes is not None:
        queries = positions if query_positions is None else query_positions
        distances = (queries[:, :, None] - positions[:, None, :]).abs()[:, None].to(logits.dtype)
        logits = logits - slopes.to(logits.dtype)[:, None, None] * distances
    if lengths is not None:
        outside = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        logits = logits.masked_fill(outside[:, None, None], -math.inf)
    weights = logits.softmax(-1)
    weights = weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    if factor is not None:
        weights = weights * factor.to(weights.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def values_and_grads(function, upstream, tensors, **options):
    inputs = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    return {"o": out.detach(), **dict(zip(inputs, grads, strict=True))}


def dropout_factor(B, H, Tq, Tk, p, seed):
    """0 or 1 / (1 - p) [B, H, Tq, Tk]: the weights of equal logits, which values of one-hot rows show."""
    parts = []
    for first in range(0, Tk, 128):
        torch.manual_seed(seed)  # every call draws the same mask
        width = min(128, Tk - first)
        v = torch.eye(Tk, device=DEVICE)[:, None, first : first + width].expand(B, Tk, H, width)
        zeros = torch.zeros(B, Tk, H, width, device=DEVICE)
        parts.append(bias_attention(zeros[:, :1].expand(B, Tq, H, width), zeros, v, p=p))
    return Tk * torch.cat(parts, -1).transpose(1, 2)


def check_against_fp64(tensors, options, p=0.0, floor=1e-6):
    q, k = tensors["q"], tensors["k"]
    upstream = torch.randn(q.shape).to(DEVICE, q.dtype)
    factor = dropout_factor(q.shape[0], q.shape[2], q.shape[1], k.shape[1], p, seed=7) if p > 0 else None
    torch.manual_seed(7)
    got = values_and_grads(bias_attention, upstream, tensors, p=p, **options)
    low = values_and_grads(eager, upstream, tensors, factor=factor, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    exact = values_and_grads(eager, upstream, exact, factor=factor, **options)
    for name, want in exact.items():
        like = tensors.get(name, q)
        assert got[name].dtype == like.dtype, name
        if want.abs().max() < 1e-12:  # of a single key: the weight is 1, and moves with nothing
            assert got[name].abs().max() < 2e-6, name
            continue
        assert_as_accurate_as_eager(got[name], low[name], want, floor=floor)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 33, 2, 16, None), (1, 197, 1, 64, None), (1, 20, 2, 24, 130)], ids=str)
def test_dropout_matches_fp64(sizes, kind):
    *shape, keys = sizes
    check_against_fp64(*make_inputs(*shape, kind, Tk=keys), p=0.3, floor=4e-6)


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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_independence(p):
    B, H, T = 4, 4, 128
    factor = dropout_factor(B, H, T, T, p, seed=3)
    kept = factor > 0.5
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    deviation = (p * (1 - p)) ** 0.5
    flat = kept.double() - (1 - p)
    assert flat.mean().abs() < 4.5 * deviation / flat.numel() ** 0.5
    for dim in range(4):  # no sample, head, query or key is kept more often than others
        means = flat.movedim(dim, 0).flatten(1).mean(1)
        assert means.abs().max() < 5 * deviation / (flat.numel() / flat.shape[dim]) ** 0.5, dim
    for dim, lag in [
        (0, 1),
        (0, 2),
        (1, 1),
        (2, 1),
        (2, 8),
        (2, 64),
        (3, 1),
        (3, 2),
        (3, 8),
        (3, 16),
        (3, 32),
        (3, 64),
    ]:
        a, b = flat.narrow(dim, 0, flat.shape[dim] - lag), flat.narrow(dim, lag, flat.shape[dim] - lag)
        assert (a * b).mean().abs() * a.numel() ** 0.5 < 4.5 * deviation**2, (dim, lag)  # nor do neighbours agree
    assert (flat * flat.transpose(2, 3)).mean().abs() * flat.numel() ** 0.5 < 9 * deviation**2  # nor (i, j) and (j, i)


def test_dropout_follows_the_seed():
    first = dropout_factor(2, 2, 40, 40, 0.3, seed=1)
    assert torch.equal(first, dropout_factor(2, 2, 40, 40, 0.3, seed=1))
    agree = ((first > 0) == (dropout_factor(2, 2, 40, 40, 0.3, seed=2) > 0)).double().mean().item()
    assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.05)
    tensors, _ = make_inputs(2, 40, 2, 16)
    torch.manual_seed(1)
    assert not torch.equal(bias_attention(**tensors, p=0.3), bias_attention(**tensors, p=0.3))


def test_backward_uses_the_mask_of_forward():
    """Gradients of one-hot upstreams show the weights: 0 exactly where forward dropped them."""
    B, T, H = 2, 70, 2
    factor = dropout_factor(B, H, T, T, 0.4, seed=11)
    v = torch.zeros(B, T, H, 70, device=DEVICE, requires_grad=True)
    q = torch.zeros(B, T, H, 70, device=DEVICE, requires_grad=True)
    torch.manual_seed(11)
    out = bias_attention(q, torch.zeros_like(q), v, p=0.4)
    upstream = torch.eye(70, device=DEVICE)[None, :, None].expand(B, T, H, 70)
    for _ in range(2):
        (grad,) = torch.autograd.grad(out, v, upstream, retain_graph=True)
        torch.testing.assert_close(T * grad.permute(0, 2, 3, 1), factor, rtol=1e-5, atol=0)


def test_dropout_off_is_exact():
    tensors, _ = make_inputs(2, 20, 2, 16)
    want, state = bias_attention(**tensors), torch.get_rng_state()
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert torch.equal(bias_attention(**tensors, **options), want)
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing


@pytest.mark.parametrize("kind", ["bias", "slopes"])
def test_is_deterministic(kind):
    tensors, options = make_inputs(3, 140, 1, 16, kind)
    upstream, runs = torch.randn(3, 140, 1, 16, device=DEVICE), []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(values_and_grads(bias_attention, upstream, tensors, p=0.3, **options))
    assert all(torch.equal(a, b) for a, b in zip(*(run.values() for run in runs), strict=True))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("kind", ["bias", "slopes"])
@pytest.mark.parametrize("tile", [(32, 32), (64, 64)], ids=str)
def test_every_tile_gives_the_same_answer(tile, kind):
    """With dropout: its mask does not depend on the tiles."""
    from d2v_fast.kernels import bias_attention as kernels
    from d2v_fast.kernels import bias_attention_grad as grad_kernels
    from d2v_fast.kernels.attention_tiles import LaunchConfig

    tensors, options = make_inputs(2, 67, 1, 16, kind)
    lengths = torch.tensor([64, 40], device=DEVICE) if kind == "slopes" else None
    q, k, v = (tensors[name] for name in "qkv")
    seed = torch.tensor(2**62 + 12345, device=DEVICE)
    positions = options.get("positions")
    bias, slopes = tensors.get("bias"), tensors.get("slopes")
    extras = kernels.Extras.make(bias, slopes, positions, positions, lengths, seed, 0.4, 0.25)
    grad = torch.randn_like(q)

    def run(config):
        out, lse = kernels.bias_attention_fwd(q, k, v, extras, config)
        grad_q, grad_slopes, delta = grad_kernels.bias_attention_dq(grad, out, lse, q, k, v, extras, config)
        both = grad_kernels.bias_attention_dkv(grad, lse, delta, q, k, v, extras, config)
        other = grad_slopes
        if bias is not None:
            other = grad_kernels.bias_attention_dbias(grad, lse, delta, q, k, v, extras, config)
        return out, lse, grad_q, *both, other

    torch.testing.assert_close(run(LaunchConfig(*tile, 4, 1)), run(None), rtol=2e-5, atol=2e-5)


def test_tiles_and_slices_of_a_gpu():
    tiles = pytest.importorskip("d2v_fast.kernels.attention_tiles")
    from d2v_fast.kernels.bias_attention_dbias import MAX_SLICES, num_slices

    for D in (1, 16, 40, 64, 80, 128):
        for dtype in (F32, BF16):
            for kernel in ("fwd", "dq", "dkv", "dbias"):
                config = tiles.config_for(*torch.empty(2, 2, 5, 3, D, dtype=dtype, device="meta"), kernel)
                assert config.block_n in (16, 32) or config.block_n % 64 == 0  # what keep_tile takes
    assert [tiles.tail_block(n, 64) for n in (64, 65, 80, 81, 197, 127)] == [0, 16, 16, 32, 16, 64]
    assert [tiles.head_block(D) for D in (1, 16, 40, 64, 96, 128)] == [16, 16, 64, 64, 128, 128]
    cpu = torch.device("cpu")
    for B in (1, 5, 128):
        for count in (1, 192, 5000):
            assert 1 <= num_slices(B, count, cpu) <= min(B, MAX_SLICES)
    assert num_slices(128, 10_000, cpu) == 1 and num_slices(128, 16, cpu) == MAX_SLICES


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_keeps_nothing_of_the_size_of_the_weights():
    tensors, _ = make_inputs(3, 70, 2, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        bias_attention(**{name: x.requires_grad_() for name, x in tensors.items()}, p=0.1)
    assert sum(x.numel() for x in saved if x.data_ptr() not in {y.data_ptr() for y in tensors.values()}) <= (
        3 * 70 * 2 * 16 + 3 * 70 * 2 + 1
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors, options = make_inputs(2, 4, 2, 3, kind, F64, extra_dtype=F64)
    inputs = [x.detach().clone().requires_grad_() for x in tensors.values()]
    lengths = torch.tensor([3, 4])
    positions = options.get("positions")

    def arguments(q, k, v, extra=None):
        return q, k, v, *((None, extra) if kind == "slopes" else (extra, None)), positions, positions, lengths

    settings = {"fast_mode": True, "check_undefined_grad": False}
    for seed in (None, torch.tensor(9)):
        torch.autograd.gradcheck(lambda *x, s=seed: _fwd(*arguments(*x), s, 0.3, 0.6)[0], inputs, **settings)
    torch.autograd.gradcheck(lambda *x: bias_attention_ref(*arguments(*x), 0.0, 0.6)[0], inputs, **settings)


@pytest.mark.parametrize("kind", ["bias", "slopes"])
def test_opcheck(kind):
    tensors, options = make_inputs(2, 5, 1, 16, kind)
    q, k, v = (tensors[name] for name in "qkv")
    positions = options.get("positions")
    extras = tensors.get("bias"), tensors.get("slopes"), positions, positions
    lengths = torch.tensor([3, 5], device=DEVICE)
    rest = lengths, torch.tensor(5, device=DEVICE), 0.3, 0.25
    out, lse = _fwd(q, k, v, *extras, *rest)
    torch.library.opcheck(_bwd, (torch.randn_like(out), out, lse, q, k, v, *extras, *rest, kind == "bias"))
    for x in tensors.values():
        x.requires_grad_()
    torch.library.opcheck(_fwd, (q, k, v, *extras, *rest))


@pytest.mark.parametrize("kind,p", [("bias", 0.0), ("slopes", 0.3)])
def test_compile_fullgraph(kind, p):
    tensors, options = make_inputs(2, 7, 1, 16, kind)
    upstream = torch.randn(2, 7, 1, 16, device=DEVICE)

    def chain(q, **others):
        return bias_attention(2 * q, **others, p=p, **options) + 1

    runs = []
    for function in (torch.compile(chain, fullgraph=True, backend="aot_eager"), chain):
        torch.manual_seed(4)
        runs.append(values_and_grads(function, upstream, tensors))
    torch.testing.assert_close(*runs)


def test_frozen_inputs():
    """A gradient is made only where one is wanted."""
    tensors, _ = make_inputs(2, 9, 2, 16)
    for name in tensors:
        inputs = {key: x.detach().requires_grad_(key == name) for key, x in tensors.items()}
        bias_attention(**inputs).square().sum().backward()
        assert [key for key, x in inputs.items() if x.grad is not None] == [name]
    assert not bias_attention(**tensors).requires_grad


def test_autocast_keeps_the_dtypes():
    tensors, _ = make_inputs(2, 9, 2, 16, dtype=BF16)
    with torch.autocast(DEVICE, BF16):
        got = values_and_grads(bias_attention, torch.ones(2, 9, 2, 16, device=DEVICE), tensors)
    assert [x.dtype for x in got.values()] == [BF16, BF16, BF16, BF16, F32]


Q = torch.zeros(2, 5, 3, 8)
INTS = torch.zeros(2, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"q": 1.0}, TypeError, "q must be a tensor, got float"),
        ({"q": Q.int()}, TypeError, "q must be float32, .* got torch.int32"),
        ({"k": Q.half()}, TypeError, "k must be torch.float32 like q, got torch.float16"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, T, H, D\] with D from 1 to 128, got shape \(5, 3, 8\)"),
        ({"q": torch.zeros(2, 5, 3, 129)}, ValueError, "D from 1 to 128, got shape"),
        ({"v": torch.zeros(2, 5, 3, 0)}, ValueError, r"v must be \[B, T, H, D\]"),
        ({"k": Q[:, :, :2]}, ValueError, r"k must have shape \(2, 5, 3, 8\), got \(2, 5, 2, 8\)"),
        ({"v": Q[:, :4]}, ValueError, r"v must have shape \(2, 5, 3, 8\), got \(2, 4, 3, 8\)"),
        ({"v": Q.to("meta")}, ValueError, "v must be on .*, got meta"),
        ({"bias": torch.zeros(3, 5, 4)}, ValueError, r"bias must have shape \(3, 5, 5\), got \(3, 5, 4\)"),
        ({"bias": torch.zeros(2, 3, 5, 5)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(3, 5, 5).long()}, TypeError, "bias must be float32, .* got torch.int64"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        (
            {"bias": torch.zeros(3, 5, 5), "slopes": torch.zeros(3), "positions": INTS},
            ValueError,
            "bias and slopes must not be given both",
        ),
        ({"slopes": torch.zeros(2), "positions": INTS}, ValueError, r"slopes must have shape \(3,\), got \(2,\)"),
        ({"slopes": torch.zeros(3)}, ValueError, "positions must be given with slopes"),
        ({"positions": INTS}, ValueError, "positions must not be given without slopes"),
        ({"query_positions": INTS}, ValueError, "positions must not be given without slopes"),
        ({"slopes": torch.zeros(3), "positions": INTS[:, :4]}, ValueError, r"positions must have shape \(2, 5\)"),
        ({"slopes": torch.zeros(3), "positions": INTS.float()}, TypeError, "positions must be int32 or int64"),
        (
            {"q": Q[:, :2], "slopes": torch.zeros(3), "positions": INTS},
            ValueError,
            "query_positions must be given for 2 queries and 5 keys",
        ),
        (
            {"slopes": torch.zeros(3), "positions": INTS, "query_positions": INTS[:1]},
            ValueError,
            "query_positions must have shape",
        ),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths must be int32 or int64, got torch.float32"),
        ({"lengths": torch.zeros(3).long()}, ValueError, r"lengths must have shape \(2,\), got \(3,\)"),
        ({"lengths": [5, 5]}, TypeError, "lengths must be a tensor, got list"),
        ({"p": 1.0}, ValueError, r"p must lie in \[0, 1\), got 1.0"),
        ({"p": -0.1, "training": False}, ValueError, r"p must lie in \[0, 1\), got -0.1"),
        ({"p": None}, TypeError, "p must be a number, got NoneType"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ],
)
def test_bad_inputs_raise(change, error, match):
    arguments = {"q": Q, "k": Q, "v": Q} | change
    move = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for k, x in arguments.items()}
    with pytest.raises(error, match=match):
        bias_attention(**move)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_does_not_wait_for_the_device(kind):
    tensors, options = make_inputs(4, 197, 12, 64, kind, BF16)
    upstream = torch.randn_like(tensors["q"])
    values_and_grads(bias_attention, upstream, tensors, p=0.1, **options)  # compiles
    with no_synchronisation():
        values_and_grads(bias_attention, upstream, tensors, p=0.1, **options)


@pytest.mark.gpu
def test_captured_graph_draws_another_mask_every_time():
    tensors, _ = make_inputs(4, 197, 12, 64, "bias", BF16)
    inputs = [x.requires_grad_() for x in tensors.values()]
    upstream = torch.randn_like(tensors["q"])

    def step():
        out = bias_attention(*inputs, p=0.3)
        return out, *torch.autograd.grad(out, inputs, upstream)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.detach().clone() for x in got])
    assert all(not torch.equal(a, b) for a, b in zip(*replays, strict=True))
    for _, *grads in replays:  # of a softmax: the gradients of a query's logits add up to 0
        assert grads[3].sum(-1).abs().max() < 1e-2 * grads[3].abs().sum(-1).max()


@pytest.mark.gpu
def test_memory_of_a_vision_transformer():
    """Forward and backward at ViT-B shapes need no tensor [B, H, N, N], which would have 119 MB in bfloat16."""
    tensors, _ = make_inputs(128, 197, 12, 64, "bias", BF16)
    upstream = torch.randn_like(tensors["q"])
    values_and_grads(bias_attention, upstream, tensors, p=0.05)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values_and_grads(bias_attention, upstream, tensors, p=0.05)
    rows = tensors["q"].numel() * 2
    assert torch.cuda.max_memory_allocated() - before < 4 * rows + 40 * 2**20
