"""The norm over many tensors and the clip factor, against float64 and against torch's own."""

import sys

import pytest
import torch
from checks import DEVICE, INTERPRET, RUNS_KERNELS, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2v_fast.ops import clip_factor, l2_norm
from d2v_fast.ops.l2_norm import _op, l2_norm_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# scalar, empty, below / at / above a block and a chunk of the GPU and of the interpreter configuration
SHAPES = [(), (0,), (7,), (2048,), (33, 31), (16, 2048), (32769,), (3, 5, 4, 300), (70000,)]


def make(dtypes, shapes=SHAPES):
    return [torch.randn(s).to(DEVICE, dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]


def exact(tensors):
    return torch.cat([x.double().flatten() for x in tensors]).square().sum().sqrt()


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F32, BF16, F16)])
def test_matches_fp64(poison, dtypes):
    tensors = make(dtypes)
    got = l2_norm(tensors)
    assert got.shape == () and got.dtype == F32 and got.device.type == DEVICE
    assert got.item() == pytest.approx(exact(tensors).item(), rel=6e-8)  # the correctly rounded answer


def test_matches_torch():
    tensors = make((F32,))
    torch.testing.assert_close(l2_norm(tensors), nn.utils.get_total_norm(tensors), rtol=1e-6, atol=0)


def test_every_element_counts_once():
    """Each element in turn, at the edges of blocks and chunks, makes the whole norm."""
    x = torch.zeros(70001, device=DEVICE)
    for i in (0, 1023, 2047, 2048, 16383, 16384, 32767, 32768, 65535, 65536, 70000):
        x[i] = -3.0
        assert l2_norm([torch.zeros(5, device=DEVICE), x, x[:0]]).item() == 3.0
        x[i] = 0.0


def test_unaligned_views_and_other_strides():
    x = torch.randn(4001, device=DEVICE).half()
    y = torch.randn(40, 50, device=DEVICE)
    tensors = [x[1:3000], x[3001:], y.t(), y[:, ::3], y.expand(3, 40, 50)]
    assert l2_norm(tensors).item() == pytest.approx(exact(tensors).item(), rel=1e-7)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_propagate(value):
    tensors = make((F32, BF16))
    tensors[-1][69_999] = value
    assert l2_norm(tensors).item() == pytest.approx(abs(value), nan_ok=True)


def test_squares_may_leave_the_range_of_float32():
    """torch's own norm is infinite for the first and 0 for the second."""
    for value in (1e30, 1e-30):
        for root in (10, 200):  # part of a block, and whole ones
            x = torch.full((root * root,), value, device=DEVICE)
            assert l2_norm([x]).item() == pytest.approx(root * value, rel=1e-6)


def test_nothing_to_add():
    assert l2_norm([]).item() == 0.0
    assert l2_norm([torch.zeros(0, device=DEVICE)]).item() == 0.0


def test_repeats_bit_for_bit_and_follows_the_tensors():
    tensors = make((F32, BF16), [(70000,), (33000,)])
    first = l2_norm(tensors)
    assert all(torch.equal(l2_norm(tensors), first) for _ in range(3))
    tensors = [2 * x for x in tensors]
    torch.testing.assert_close(l2_norm(tensors), 2 * first, rtol=1e-7, atol=0)


def test_gradients_are_not_recorded():
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    assert not l2_norm([x]).requires_grad


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_float64():
    assert l2_norm([torch.full((4,), 2.0, dtype=torch.float64), torch.zeros(2)]).item() == 4.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(0, 2**31))
def test_equals_one_long_vector(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator).to(DEVICE) for n in sizes]
    assert l2_norm(tensors).item() == pytest.approx(exact(tensors).item(), rel=6e-8)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("chunk,block", [(64, 16), (32, 32)])
def test_every_tile_gives_the_same_answer(chunk, block):
    from d2v_fast.kernels import l2_norm as kernels
    from d2v_fast.kernels.chunks import LaunchConfig

    tensors = make((F32, BF16), [(7,), (64,), (130,)])
    got = kernels.l2_norm(tensors, LaunchConfig(chunk, block, num_warps=4))
    assert got.item() == pytest.approx(exact(tensors).item(), rel=6e-8)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_more_tensors_than_one_launch_takes(monkeypatch):
    from d2v_fast.kernels import chunks, l2_norm

    monkeypatch.setattr(chunks, "MAX_TENSORS", 3)
    tensors = make((F32,), [(5,), (0,), (9,)] * 4)
    assert l2_norm.l2_norm(tensors).item() == pytest.approx(exact(tensors).item(), rel=6e-8)


@pytest.mark.parametrize("shifted", [0, 1])
def test_kernel_is_told_of_tensors_that_are_not_aligned(monkeypatch, shifted):
    pytest.importorskip("triton")
    from d2v_fast.kernels import l2_norm as kernels

    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: told.append(options.get("ALIGNED"))

    monkeypatch.setattr(kernels, "_sum_of_squares_kernel", Kernel())
    monkeypatch.setattr(kernels, "_root_of_sum_kernel", Kernel())
    kernels.l2_norm([torch.zeros(72, device=DEVICE)[shifted:]])
    assert told == [shifted == 0, None]


def test_opcheck():
    torch.library.opcheck(_op, (make((F32, BF16), [(5,), (3, 2)]),))


def test_compile_fullgraph():
    tensors = make((F32,), [(5,), (3, 2)])
    got = torch.compile(lambda xs: clip_factor(l2_norm(xs), 0.5), fullgraph=True, backend="aot_eager")(tensors)
    torch.testing.assert_close(got, clip_factor(l2_norm_ref(tensors), 0.5))


def test_clip_factor_is_that_of_torch():
    for size in (0.1, 3.0):
        grads = [torch.full((4,), size, device=DEVICE), torch.full((2, 2), -size, device=DEVICE)]
        leaves = [torch.zeros_like(g, requires_grad=True) for g in grads]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g.clone()
        norm = l2_norm(grads)
        nn.utils.clip_grads_with_norm_(leaves, 1.5, norm)
        for leaf, g in zip(leaves, grads, strict=True):
            assert torch.equal(leaf.grad, g * clip_factor(norm, 1.5))
    assert clip_factor(torch.tensor(float("inf")), 1.0).item() == 0.0
    assert clip_factor(torch.tensor(float("nan")), 1.0).isnan()
    assert clip_factor(torch.tensor(0.0), 1.0).item() == 1.0


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x: l2_norm([x, x.long()]), TypeError, r"tensors\[1\] must be float32.*int64"),
        (lambda x: l2_norm([x, x.to("meta")]), ValueError, r"tensors\[1\] must be on .* got meta"),
        (lambda x: l2_norm(x), TypeError, "tensors must be a list of tensors, got Tensor"),
        (lambda x: l2_norm([x, None]), TypeError, r"tensors\[1\] must be a tensor, got NoneType"),
        (lambda x: clip_factor(None, 1.0), TypeError, "norm must be a tensor, got NoneType"),
        (lambda x: clip_factor(x[0], None), TypeError, "max_norm must be a number, got NoneType"),
        (lambda x: clip_factor(x, 1.0), ValueError, r"norm must have shape \[\], got \(4,\)"),
        (lambda x: clip_factor(x[0].half(), 1.0), TypeError, "norm must be a float32 or float64 tensor, got .*float16"),
        (lambda x: clip_factor(x[0], 0.0), ValueError, "max_norm must be > 0, got 0.0"),
        (lambda x: clip_factor(x[0], float("nan")), ValueError, "max_norm must be > 0, got nan"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(4, device=DEVICE))


@pytest.mark.gpu
def test_does_not_wait_for_the_device_and_is_captured():
    tensors = make((F32, BF16))
    l2_norm(tensors)  # compiles
    with no_synchronisation():
        l2_norm([x.clone() for x in tensors])  # builds another table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = l2_norm(tensors)
    for x in tensors:
        x.mul_(2)
    graph.replay()
    assert norm.item() == pytest.approx(exact(tensors).item(), rel=6e-8)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    x = torch.zeros(2**31 + 5, dtype=BF16, device=DEVICE)
    x[0], x[-1] = 4, 3
    assert l2_norm([x[:7], x]).item() == pytest.approx(41**0.5)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_runs_the_kernel(monkeypatch):
    """Guards the suite itself: the CPU key must not fall back to the reference here."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.l2_norm"], "l2_norm_ref", None)
    assert l2_norm([torch.ones(4)]).item() == 2.0
