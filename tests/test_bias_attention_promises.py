"""What bias_attention promises beside its numbers: determinism, tiles, memory, compiling, errors."""

import pytest
import torch
from bias_attention_cases import KINDS, make_inputs, values_and_grads
from checks import DEVICE, RUNS_KERNELS, no_synchronisation

from d2v_fast.ops import bias_attention
from d2v_fast.ops.bias_attention import _bwd, _fwd, bias_attention_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


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


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """The last sample of many: as if it were alone. The others are zeros, and give the bias no gradient."""
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GB of GPU memory")
    B, T, H, D = 2**15 + 4, 64, 16, 64
    q = torch.zeros(B, T, H, D, dtype=BF16, device=DEVICE)
    q[-1] = torch.randn(T, H, D)
    bias = torch.randn(H, T, T, device=DEVICE)
    got = values_and_grads(bias_attention, q, {"q": q, "k": q, "v": q, "bias": bias})
    last = q[-1:].clone()
    want = values_and_grads(bias_attention, last, {"q": last, "k": last, "v": last, "bias": bias})
    for name in ("o", "q", "k", "v"):
        torch.testing.assert_close(got[name][-1:], want[name], rtol=1e-2, atol=1e-2)
        assert not got[name][:-1].any(), name
    torch.testing.assert_close(got["bias"], want["bias"], rtol=1e-2, atol=1e-3)
