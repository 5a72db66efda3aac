"""What the fused loss promises beside its numbers: gradients, tiles, memory, determinism, graphs."""

import pytest
import torch
from checks import DEVICE, RUNS_KERNELS, no_synchronisation
from eager_targets import EPS, eager_spread, make_layers, some_positions
from loss_cases import check_against_fp64, fused, make_pred
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.ops import data2vec_loss
from d2v_fast.ops.data2vec_loss import _bwd, _fwd, data2vec_loss_ref, moments_ref
from d2v_fast.ops.layer_targets import NORMS, POST_NORMS

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_gradient_can_be_taken_again():
    positions = some_positions(2, 30)
    pred = make_pred(len(positions), 12, BF16).clone().requires_grad_()
    loss = data2vec_loss(pred, make_layers(2, 2, 30, 12), positions).loss
    grads = [torch.autograd.grad(loss * w, pred, retain_graph=True)[0] for w in (1.0, 3.0, 1.0)]
    assert torch.equal(grads[0], grads[2]) and torch.equal((grads[0].float() * 3).bfloat16(), grads[1])
    assert grads[0].data_ptr() != grads[2].data_ptr()


def test_upstream_gradient_is_not_rounded_to_the_predictions_dtype():
    positions = some_positions(2, 30)
    pred, layers = make_pred(len(positions), 12, BF16), make_layers(2, 2, 30, 12)
    _, one = fused(pred, layers, positions)
    _, grad = fused(pred, layers, positions, upstream=1.00390625)  # halfway to the next bfloat16
    assert torch.equal(grad, (one.float() * 1.00390625).bfloat16()) and not torch.equal(grad, one)


@pytest.mark.parametrize("shape", [(130, 1031), (1, 7), (64, 1024), (0, 5)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_scales_every_element(shape, dtype):
    """Sizes below, at and beyond whole blocks of the GPU and of the interpreter."""
    one, factor = torch.randn(shape, device=DEVICE).to(dtype), torch.tensor(-0.3, device=DEVICE)
    assert torch.equal(_bwd(factor, one), (one.float() * factor).to(dtype))


def test_only_pred_gets_a_gradient():
    layers = [x.clone().requires_grad_() for x in make_layers(2, 2, 6, 5)]
    pred, positions = make_pred(3, 5).clone().requires_grad_(), torch.tensor([1, 4, 9], device=DEVICE)
    data2vec_loss(pred, layers, positions).loss.backward()
    assert pred.grad is not None and all(x.grad is None for x in layers)
    assert not data2vec_loss(pred.detach(), layers, positions).loss.requires_grad
    with torch.no_grad():
        out = data2vec_loss(pred, layers, positions)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, data2vec_loss(pred, layers, positions).loss)


def test_is_deterministic():
    positions = some_positions(3, 140)
    pred, layers = make_pred(len(positions), 300, BF16), make_layers(3, 3, 140, 300, BF16)
    first, second = (fused(pred, layers, positions, upstream=1.3) for _ in range(2))
    assert torch.equal(first[1], second[1]) and first[0] == second[0]


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, beta):
    layers, positions = make_layers(2, 2, 6, 3, torch.float64), torch.tensor([0, 5, 7, 11])
    pred = make_pred(4, 3, torch.float64).clone().requires_grad_()
    assert data2vec_loss(pred, layers, positions).target_var.dtype == torch.float64

    def loss(p):
        return data2vec_loss(p, layers, positions, norm=norm, beta=beta, scale=0.3).loss

    assert torch.autograd.gradcheck(loss, (pred,))
    assert torch.autograd.gradcheck(lambda p: data2vec_loss_ref(p, layers, positions, norm=norm, beta=beta)[0], (pred,))


def test_opcheck():
    layers, positions = make_layers(2, 2, 6, 5), torch.tensor([1, 4, 9], device=DEVICE)
    lengths, clones = torch.tensor([6, 2], device=DEVICE), torch.tensor([1, 1, 0], device=DEVICE)
    pred = make_pred(3, 5, BF16).clone().requires_grad_()
    torch.library.opcheck(_fwd, (pred, layers, positions, lengths, clones, "instance", "layer", 0.5, 2.0, EPS, True))
    torch.library.opcheck(
        _fwd, (pred.detach(), layers, positions, None, None, "layer", "instance", 0.0, 1.0, EPS, False)
    )
    torch.library.opcheck(_bwd, (torch.tensor(0.3, device=DEVICE), torch.randn(3, 5, device=DEVICE).bfloat16()))


@pytest.mark.parametrize("layout", ["BTC", "TBC"])
def test_compile_fullgraph(layout):
    layers = make_layers(2, 4, 6, 8)
    positions = torch.tensor([1, 5, 17], device=DEVICE)
    pred = make_pred(3, 8).clone().requires_grad_()

    def step(p, xs):
        out = data2vec_loss(p * 2, [x * 2 for x in xs], positions, layout=layout, beta=0.5)
        return out.loss * 3, out.target_var + out.pred_var

    loss, spread = torch.compile(step, fullgraph=True, backend="aot_eager")(pred, layers)
    want, want_spread = step(pred, layers)
    torch.testing.assert_close((loss, spread), (want, want_spread))
    torch.testing.assert_close(torch.autograd.grad(loss, pred), torch.autograd.grad(want, pred))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("block_n,block_c,tiles", [(4, 16, 1), (4, 8, 3), (16, 16, 50), (1, 32, 7)])
@pytest.mark.parametrize("norm,post_norm", [("instance", "none"), ("layer", "layer")])
def test_every_tile_gives_the_same_answer(norm, post_norm, block_n, block_c, tiles, ignored):
    from d2v_fast.kernels import data2vec_loss as kernels

    layers, positions = make_layers(2, 2, 21, 37, BF16), some_positions(2, 21)
    pred = make_pred(len(positions), 37, BF16)
    if ignored:  # whole programs, and whole tiles of others
        positions[:9] = -1
    block_c = 64 if norm == "layer" else block_c
    config = kernels.LaunchConfig(block_n, block_c, tiles, num_warps=4)
    settings = (positions, None, None, norm, post_norm, 0.5, 2.0, EPS)
    loss, grad, moments, spread = kernels.data2vec_loss_fwd(pred, layers, *settings, True, config)
    p = pred.detach().requires_grad_()
    want, target = data2vec_loss_ref(p, layers, *settings)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want, p)[0])
    rows = pred[positions >= 0].float()
    torch.testing.assert_close(moments, torch.stack((moments_ref(target), moments_ref(rows))))
    torch.testing.assert_close(spread, torch.stack((eager_spread(target), eager_spread(rows))))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_kernel_makes_a_position_out_of_range_loud(norm, monkeypatch):
    from d2v_fast.kernels import data2vec_loss as kernels

    monkeypatch.setattr(torch, "empty", torch.zeros)  # the NaN must come from the kernel, not from the poison
    layers, pred = make_layers(2, 2, 6, 5), make_pred(4, 5)

    def run(positions, clones=None):
        args = (None, clones, norm, "none", 0.0, 1.0, EPS, True)
        return kernels.data2vec_loss_fwd(pred, layers, torch.tensor(positions, device=DEVICE), *args)

    for wrong in (12, 10**12):
        loss, grad, _, spread = run([3, wrong, 11, 0])
        assert loss.isnan() and spread[0].isnan() and spread[1].isfinite()
        assert grad.isnan().all(1).tolist() == [False, True, False, False]
    for wrong in (-1, 2):
        loss, grad, *_ = run([3, 20, 11, 0], torch.tensor([0, 1, 1, wrong], device=DEVICE))
        assert loss.isnan() and grad.isnan().all(1).tolist() == [False, True, False, False]
    for fine in ([3, 1, 11, 0], [3, -1, 11, -(10**12)]):
        assert run(fine)[0].isfinite()
    layers, pred = make_layers(2, 2, 0, 5), make_pred(2, 5)
    loss, grad, *_ = run([-1, 0])
    assert loss.isnan() and grad.isnan().all()


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that is made, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result, x in zip(func._schema.returns, out if isinstance(out, tuple) else (out,), strict=True):
            if result.alias_info is None and isinstance(x, torch.Tensor):
                self.sizes.append(x.nbytes)
        return out


class NoLaunch:
    """Stands in for a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def extra_memory(monkeypatch, layers, N, norm, post_norm):
    """Bytes that the launcher allocates on a GPU beside the gradient, for tensors without data; no kernel runs."""
    kernels = pytest.importorskip("d2v_fast.kernels.data2vec_loss")
    for module, name in (
        (kernels, "_data2vec_loss_kernel"),
        (kernels, "_merge_kernel"),
        (kernels.targets, "_column_stats_kernel"),
        (kernels.launch, "_pointer_table_kernel"),
    ):
        monkeypatch.setattr(module, name, NoLaunch())
    pred = torch.empty(N, layers[0].shape[2], dtype=BF16, device="meta")
    positions = torch.empty(N, dtype=torch.int64, device="meta")
    with Allocations() as made:
        kernels.data2vec_loss_fwd(pred, layers, positions, None, None, norm, post_norm, 0.0, 1.0, EPS, True)
    assert made.sizes.count(pred.nbytes) == 1
    return sum(made.sizes) - pred.nbytes


@pytest.mark.parametrize(
    "K,B,T,C,N,norm,post_norm,dtype",
    [
        (8, 15, 780, 768, 5230, "instance", "none", BF16),  # speech base
        (8, 4, 938, 1024, 1838, "instance", "none", BF16),  # speech large
        (10, 16, 512, 768, 1229, "layer", "none", BF16),  # text base
        (6, 128, 196, 768, 15360, "layer", "layer", BF16),  # vision base
        (6, 128, 196, 768, 15360, "layer", "layer", F32),
        (6, 64, 196, 1024, 7680, "layer", "layer", BF16),  # vision large
    ],
)
def test_extra_memory_is_two_percent_of_the_layer_results(K, B, T, C, N, norm, post_norm, dtype, monkeypatch):
    layers = [torch.empty(B, T, C, dtype=dtype, device="meta") for _ in range(K)]
    assert 0 < extra_memory(monkeypatch, layers, N, norm, post_norm) <= 0.02 * sum(x.nbytes for x in layers)


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
@pytest.mark.parametrize("C", [64, 768, 1024, 2048])
@pytest.mark.parametrize("K,B,T,fraction", [(8, 15, 100, 0.45), (8, 4, 49, 0.6), (3, 4, 49, 0.6), (1, 64, 2000, 1.0)])
def test_extra_memory_where_the_layer_results_are_small(K, B, T, C, fraction, norm, monkeypatch):
    """Statistics and one part per processor may be more than two percent of them, as documented; nothing else is."""
    layers = [torch.empty(B, T, C, dtype=BF16, device="meta") for _ in range(K)]
    statistics = 8 * K * B * C if norm == "instance" else 0
    partial_sums = max(sum(x.nbytes for x in layers) // 64, 132 * 16 * C)
    results = 32 * C + 8 * K + 4 * 132 * 16 + 100  # moments, spread, addresses, losses of the programs
    N = round(fraction * B * T)
    assert extra_memory(monkeypatch, layers, N, norm, "none") <= statistics + partial_sums + results


def test_gpu_tiles_fill_the_processors_once():
    """Where there are rows enough for that, and every program of a wave has rows."""
    kernels = pytest.importorskip("d2v_fast.kernels.data2vec_loss")
    for whole_rows in (False, True):
        for N, C in ((1, 5), (1229, 768), (5230, 768), (15360, 1024), (200, 2048), (100, 10_000)):
            layers = [torch.empty(8, N, C, device="meta")] * 8
            config = kernels.config_for(torch.empty(N, C, device="meta"), layers, whole_rows)
            parts, col_blocks = -(-N // (config.block_n * config.tiles)), -(-C // config.block_c)
            assert parts * col_blocks * config.num_warps <= 132 * 16 or config.tiles == 1
            assert config.tiles == 1 or parts * col_blocks * config.num_warps >= 132 * 8
            assert config.block_c >= C or not whole_rows
            assert config.block_n * config.block_c <= 512 * config.num_warps or config.num_warps == 16


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("post_norm", POST_NORMS)
def test_does_not_wait_for_the_device(norm, post_norm):
    positions, lengths = some_positions(2, 50), torch.tensor([50, 30], device=DEVICE)
    clones = torch.tensor([1, 0], device=DEVICE)
    pred, layers = make_pred(len(positions), 768, BF16), make_layers(4, 2, 50, 768, BF16)
    options = {"norm": norm, "post_norm": post_norm, "lengths": lengths, "target_batch_index": clones}
    fused(pred, layers, positions, **options)  # compiles
    with no_synchronisation():
        fused(pred, layers, positions, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_captured_graph_reads_the_tensors_again(norm):
    positions = some_positions(3, 50)
    pred = make_pred(len(positions), 64, BF16).clone().requires_grad_()
    layers = make_layers(3, 3, 50, 64, BF16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(data2vec_loss(pred, layers, positions, norm=norm).loss, pred)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = data2vec_loss(pred, layers, positions, norm=norm)
        (grad,) = torch.autograd.grad(out.loss, pred)
    for x in (*layers, pred.detach()):
        x.copy_(torch.randn_like(x))
    positions.copy_(positions.flip(0))
    graph.replay()
    want, want_grad = fused(pred, layers, positions, norm=norm)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
    assert torch.equal(out.target_var, want.target_var) and torch.equal(out.pred_var, want.pred_var)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_is_deterministic_at_a_real_size(norm):
    positions = some_positions(15, 780)
    pred, layers = make_pred(len(positions), 768, BF16), make_layers(8, 15, 780, 768, BF16)
    check_against_fp64(pred, layers, positions, norm=norm, scale=768**-0.5)
    want, want_grad = fused(pred, layers, positions, norm=norm)
    for _ in range(10):
        got, grad = fused(pred, layers, positions, norm=norm)
        assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
        assert torch.equal(got.target_var, want.target_var) and torch.equal(got.pred_var, want.pred_var)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_offsets_beyond_int32(norm):
    stride = 2**30 + 2**20
    if torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 9 GB of GPU memory")
    storage = torch.empty(2 * stride + 64 * 9, dtype=BF16, device=DEVICE)
    x = storage.as_strided((3, 8, 64), (stride, 64, 1))
    x.copy_(torch.randn(3, 8, 64))
    pred = storage.as_strided((3, 64), (stride, 1), 512)
    pred.copy_(torch.randn(3, 64))
    check_against_fp64(pred, [x], torch.tensor([2, 11, 23], device=DEVICE), norm=norm)
