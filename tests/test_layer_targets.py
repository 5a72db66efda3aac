import importlib

import pytest
import torch
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from eager_targets import EPS, eager_targets, make_layers, some_positions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_fast.ops import layer_targets
from d2v_fast.ops.layer_targets import NORMS, POST_NORMS, _op, layer_targets_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check_against_fp64(layers, **options):
    got = layer_targets(layers, **options)
    assert got.dtype == F32 and got.is_contiguous() and not got.requires_grad
    options.pop("layout", None)
    eager = eager_targets([x.float() for x in layers], **options)
    exact = eager_targets([x.double() for x in layers], **options)
    assert_as_accurate_as_eager(got, eager, exact)


@pytest.mark.parametrize("post_norm", POST_NORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_matches_fp64(norm, post_norm, with_lengths, gathered):
    B, T, C = 3, 70, 33
    lengths = torch.tensor([70, 66, 5], device=DEVICE, dtype=torch.int32) if with_lengths else None
    positions = some_positions(B, T) if gathered else None
    check_against_fp64(make_layers(3, B, T, C), norm=norm, post_norm=post_norm, positions=positions, lengths=lengths)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "K,B,T,C", [(1, 1, 2, 1), (8, 2, 21, 64), (10, 1, 9, 768), (24, 1, 3, 2048), (40, 1, 3, 5), (2, 5, 65, 600)]
)
def test_shapes_and_dtypes(K, B, T, C, dtype, norm):
    check_against_fp64(make_layers(K, B, T, C, dtype), norm=norm, positions=some_positions(B, T, torch.int64))


@pytest.mark.parametrize("norm", ["instance", "batch", "layer"])
def test_mean_far_larger_than_spread(norm):
    """The naive variance, E[x^2] - E[x]^2, has no correct digit left here."""
    layers = make_layers(2, 2, 150, 16, mean=300.0)
    if norm == "layer":
        layers = [x.transpose(1, 2) for x in layers]
    check_against_fp64(layers, norm=norm, lengths=torch.tensor([layers[0].shape[1], 3], device=DEVICE))


def test_first_frames_far_from_the_rest():
    layers = make_layers(2, 2, 150, 16)
    layers = [torch.cat((x[:, :64] * 1e-3 + 50, x[:, 64:]), dim=1) for x in layers]
    check_against_fp64(layers, norm="instance")


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_layouts_and_strides(norm):
    btc = make_layers(3, 2, 70, 40, BF16)
    positions = some_positions(2, 70)
    want = layer_targets([x.contiguous() for x in btc], norm=norm, positions=positions)
    tbc = [x.transpose(0, 1).contiguous() for x in btc]
    odd = [torch.cat((x, x), dim=2)[:, :, 3:43].copy_(x) for x in btc]  # rows that start off a vector boundary
    mixed = [btc[0].contiguous(), *btc[1:]]
    reversed_channels = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in btc]
    assert torch.equal(layer_targets(btc, norm=norm, positions=positions), want)
    assert torch.equal(layer_targets(tbc, norm=norm, positions=positions, layout="TBC"), want)
    assert torch.equal(layer_targets(odd, norm=norm, positions=positions), want)
    assert torch.equal(layer_targets(tuple(mixed), norm=norm, positions=positions), want)
    assert torch.equal(layer_targets(reversed_channels, norm=norm, positions=positions), want)


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_positions_in_any_order(norm):
    layers = make_layers(2, 3, 30, 20)
    positions = torch.randint(0, 90, (100,), device=DEVICE, dtype=torch.int32)
    dense = layer_targets(layers, norm=norm)
    assert torch.equal(layer_targets(layers, norm=norm, positions=positions), dense.flatten(0, 1)[positions.long()])
    every_other = positions.repeat_interleave(2)[::2]
    assert torch.equal(layer_targets(layers, norm=norm, positions=every_other), dense.flatten(0, 1)[positions.long()])
    assert layer_targets(layers, norm=norm, positions=positions[:0]).shape == (0, 20)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_padding_stays_out_of_the_statistics(norm):
    layers = make_layers(2, 3, 70, 12)
    lengths = torch.tensor([70, 4, 0], device=DEVICE)
    want = layer_targets(layers, norm=norm, lengths=lengths)
    spoiled = [x.clone() for x in layers]
    for x in spoiled:
        x[1, 4:], x[2] = float("nan"), float("inf")
    got = layer_targets(spoiled, norm=norm, lengths=lengths)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, :4], want[1, :4])
    if norm == "instance":  # length 0: mean 0, variance 0
        torch.testing.assert_close(want[2], (layers[0][2] + layers[1][2]) / 2 / EPS**0.5)


@pytest.mark.parametrize("frame", [0, 66])  # in the first tile of the statistics, and in a later one
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_inf_propagate_to_what_they_belong_to(norm, bad, frame):
    layers = make_layers(2, 2, 70, 12)
    layers[1][1, frame, 5] = bad
    expected = torch.zeros(2, 70, 12, dtype=torch.bool, device=DEVICE)
    where = {"instance": (1, slice(None), 5), "layer": (1, frame), "batch": (slice(None), slice(None), 5)}
    expected[where.get(norm, (1, frame, 5))] = True
    got = layer_targets(layers, norm=norm)
    assert torch.equal(got.isinf() if norm == "none" and bad > 0 else got.isnan(), expected)


def test_constant_channel_gives_zero():
    layers = [torch.full((2, 10, 4), 7.0, device=DEVICE)]
    for norm in ("instance", "batch", "layer"):
        rounded = 7.0 * 2**-22 / EPS**0.5  # the GPU's division is off by up to 2 ulp
        assert layer_targets(layers, norm=norm).abs().max() <= (rounded if DEVICE == "cuda" else 0)


def test_result_is_new_and_has_no_gradient():
    layers = [x.clone().requires_grad_() for x in make_layers(1, 2, 5, 4)]
    y = layer_targets(layers, norm="none")
    assert not y.requires_grad and y.data_ptr() != layers[0].data_ptr() and torch.equal(y, layers[0])


@pytest.mark.parametrize("shape,norm", [((0, 5, 4), "instance"), ((2, 0, 4), "layer"), ((2, 5, 0), "instance")])
def test_empty(shape, norm):
    layers = [torch.empty(shape, device=DEVICE)] * 2
    assert layer_targets(layers, norm=norm).shape == shape
    assert layer_targets(layers, norm=norm, post_norm="layer", positions=some_positions(0, 0)).shape == (0, shape[2])


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("norm", NORMS)
def test_float64_stays_float64(norm):
    layers = make_layers(2, 2, 6, 5, torch.float64)
    got = layer_targets(layers, norm=norm)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, eager_targets(layers, norm))


def test_opcheck():
    layers = make_layers(2, 2, 6, 5)
    positions, lengths = some_positions(2, 6), torch.tensor([6, 2], device=DEVICE)
    torch.library.opcheck(_op, (layers, positions, lengths, "instance", "layer", EPS))
    torch.library.opcheck(_op, (layers, None, None, "none", "instance", EPS))


@pytest.mark.parametrize("layout", ["BTC", "TBC"])
def test_compile_fullgraph(layout):
    layers = [x.requires_grad_() for x in make_layers(2, 4, 6, 5)]
    positions = torch.tensor([1, 5, 17], device=DEVICE)

    def targets(xs, scale):
        return layer_targets([x * 2 for x in xs], layout=layout, positions=positions) * scale

    scale = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")(layers, scale)
    torch.testing.assert_close(compiled, targets(layers, scale))
    compiled.square().sum().backward()
    assert all(x.grad is None for x in layers) and scale.grad.isfinite()


@settings(
    max_examples=8 if INTERPRET else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_options_match_fp64(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    K, B, T, C = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 4), (2, 80), (1, 70)))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    layers = make_layers(K, B, T, C, draw(F32, BF16, F16), mean=draw(0.0, 1.0, 30.0))
    positions = draw(None, torch.randint(0, B * T, (data.draw(st.integers(0, 150)),), device=DEVICE))
    options = {"norm": draw(*NORMS), "post_norm": draw(*POST_NORMS), "positions": positions}
    options["lengths"] = draw(None, torch.randint(1, T + 1, (B,), device=DEVICE, dtype=draw(torch.int32, torch.int64)))
    if draw("BTC", "TBC") == "TBC":
        stored = [x.transpose(0, 1).contiguous() for x in layers]
        assert torch.equal(layer_targets(stored, layout="TBC", **options), layer_targets(layers, **options))
    check_against_fp64(layers, **options)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_kernel_clamps_lengths(norm):
    """They are not checked on a GPU; what lies behind a sequence in memory must not get into its statistics."""
    from d2v_fast.kernels import layer_targets as kernels

    layers = make_layers(2, 2, 30, 12)
    got, want = (
        kernels.layer_targets(layers, None, torch.tensor(lengths, device=DEVICE), norm, "none", EPS)
        for lengths in ([100, -1], [30, 0])
    )
    assert torch.equal(got, want) and want.isfinite().all()


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("norm,post_norm", [("instance", "none"), ("layer", "layer"), ("instance", "layer")])
def test_every_tile_gives_the_same_answer(norm, post_norm):
    from d2v_fast.kernels import layer_targets as kernels

    layers, positions = make_layers(2, 2, 11, 37, BF16), some_positions(2, 11)
    block_c = 64 if "layer" in (norm, post_norm) else 16
    config = kernels.LaunchConfig(block_t=4, block_c_stats=16, block_n=4, block_c=block_c, num_warps=4)
    got = kernels.layer_targets(layers, positions, None, norm, post_norm, EPS, config)
    torch.testing.assert_close(got, layer_targets_ref(layers, positions, None, norm, post_norm, EPS))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_kernel_marks_positions_out_of_range(monkeypatch):
    from d2v_fast.kernels import layer_targets as kernels

    monkeypatch.setattr(torch, "empty", torch.zeros)  # the NaN must come from the kernel, not from the poison
    layers = make_layers(2, 2, 6, 5)
    positions = torch.tensor([3, -1, 12, 11, 10**12], device=DEVICE)
    got = kernels.layer_targets(layers, positions, None, "instance", "none", EPS)
    assert got.isnan().all(1).tolist() == [False, True, True, False, True]
    assert torch.equal(got[::3], layer_targets(layers).flatten(0, 1)[positions[::3]])


def test_gpu_tiles_hold_whole_rows_for_layer_norm():
    kernels = pytest.importorskip("d2v_fast.kernels.layer_targets")
    for C in (1, 37, 768, 1024, 5000):
        config = kernels.config_for(torch.empty(1, 2, C, device="meta"), whole_rows=True)
        assert config.block_c >= C and config.block_n * config.block_c <= max(4096, config.block_c)


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x: layer_targets([]), ValueError, "layer_results must hold at least one tensor"),
        (lambda x: layer_targets(None), TypeError, "layer_results must be a list of tensors, got NoneType"),
        (lambda x: layer_targets(x[0]), TypeError, "layer_results must be a list of tensors, got Tensor"),
        (lambda x: layer_targets([x[0], None]), TypeError, r"layer_results\[1\] must be a tensor, got NoneType"),
        (lambda x: layer_targets(x, positions=[1, 2]), TypeError, "positions must be a tensor, got list"),
        (lambda x: layer_targets(x, lengths=5), TypeError, "lengths must be a tensor, got int"),
        (lambda x: layer_targets([x[0][0]]), ValueError, r"layer_results must have 3 dims, got shape \(5, 8\)"),
        (lambda x: layer_targets([x[0], x[1][:, 1:]]), ValueError, r"must have shape \(4, 5, 8\), got \(4, 4, 8\)"),
        (lambda x: layer_targets([x[0], x[1].bfloat16()]), TypeError, r"\[1\] must be torch.float32 .* torch.bfloat16"),
        (lambda x: layer_targets([x[0].int()]), TypeError, r"layer_results\[0\] must be float32.*int32"),
        (lambda x: layer_targets([x[0], x[1].to("meta")]), ValueError, "must be on .*, got meta"),
        (lambda x: layer_targets(x, norm="group"), ValueError, "norm must be one of instance, .*'group'"),
        (lambda x: layer_targets(x, post_norm="batch"), ValueError, "post_norm must be one of none, .*'batch'"),
        (lambda x: layer_targets(x, layout="BCT"), ValueError, "layout must be one of BTC, TBC, got 'BCT'"),
        (lambda x: layer_targets(x, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (lambda x: layer_targets([y[:, :1] for y in x]), ValueError, "at least 2 frames, .* T = 1"),
        (lambda x: layer_targets([y[:1] for y in x], layout="TBC"), ValueError, "at least 2 frames, .* T = 1"),
        (lambda x: layer_targets([y[:, :1] for y in x], norm="none", post_norm="instance"), ValueError, "T = 1"),
        (lambda x: layer_targets([y[:1, :1] for y in x], norm="batch"), ValueError, r"B \* T = 1"),
        (lambda x: layer_targets(x, positions=torch.ones(2, device=DEVICE)), TypeError, "positions must be int32 or"),
        (lambda x: layer_targets(x, positions=x[0][0].long()), ValueError, r"positions must have shape \[N\], got"),
        (lambda x: layer_targets(x, lengths=torch.ones(4, device=DEVICE)), TypeError, "lengths must be int32 or"),
        (lambda x: layer_targets(x, lengths=x[0][0, 0].int()), ValueError, r"must have shape \(4,\), got \(8,\)"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call([torch.zeros(4, 5, 8, device=DEVICE) for _ in range(2)])


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot check without a synchronisation")
def test_indices_out_of_range_raise_on_cpu():
    layers = make_layers(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 9\], got values from 3 to 10"):
        layer_targets(layers, positions=torch.tensor([3, 10]))
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 9\], got values from -1 to 3"):
        layer_targets(layers, positions=torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 5\], got values from 2 to 6"):
        layer_targets(layers, lengths=torch.tensor([6, 2]))
    with pytest.raises(ValueError, match="positions must be empty where layer_results has no frames, got 2 values"):
        layer_targets([x[:0] for x in layers], positions=torch.tensor([0, 1]))


def test_check_looks_at_the_ranges_before_the_op_runs(monkeypatch):
    op = importlib.import_module("d2v_fast.ops.layer_targets")  # the package holds the function under this name
    monkeypatch.setattr(op, "_op", None)
    layers = make_layers(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 9\], got values from 10 to 10"):
        layer_targets(layers, positions=torch.tensor([10], device=DEVICE), check=True)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 5\], got values from -1 to 6"):
        layer_targets(layers, lengths=torch.tensor([6, -1], device=DEVICE), check=True)


@pytest.mark.parametrize("norm", NORMS)
def test_is_deterministic(norm):
    layers, positions = make_layers(4, 3, 150, 96, BF16), some_positions(3, 150)
    runs = [layer_targets(layers, norm=norm, post_norm="layer", positions=positions) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("post_norm", POST_NORMS)
def test_does_not_wait_for_the_device(norm, post_norm):
    layers, positions = make_layers(4, 2, 50, 768, BF16), some_positions(2, 50)
    lengths = torch.tensor([50, 30], device=DEVICE)
    options = {"norm": norm, "post_norm": post_norm, "positions": positions, "lengths": lengths}
    layer_targets(layers, **options)  # compiles
    with no_synchronisation():
        layer_targets(layers, **options)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    stride = 2**30 + 2**20
    if torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 9 GB of GPU memory")
    storage = torch.empty(2 * stride + 64 * 8, dtype=BF16, device=DEVICE)
    x = storage.as_strided((3, 8, 64), (stride, 64, 1))
    x.copy_(torch.randn(3, 8, 64))
    for norm in ("instance", "layer"):
        check_against_fp64([x], norm=norm)


@pytest.mark.gpu
def test_captured_graph_reads_the_tensors_again():
    layers = make_layers(3, 2, 50, 64, BF16)
    layer_targets(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_targets(layers)
    for x in layers:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer_targets(layers))


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_refuses_bf16_reductions():
    import triton
    import triton.language as tl

    @triton.jit
    def add_up(x_ptr, y_ptr):
        tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 4)), axis=0))

    with pytest.raises(Exception, match="convert to float32 first"):
        add_up[(1,)](torch.ones(4, dtype=BF16), torch.ones(1, dtype=BF16))
