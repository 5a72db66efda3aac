"""The committed table of launches and bytes, and the counters it rests on."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from checks import INTERPRET

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = {"strided_conv", "conv_encoder", "pos_conv"}
TABLE = ROOT / "benchmarks" / "results" / "static" / "cost.json"


@pytest.fixture(scope="module")
def static_cost():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import static_cost
    return static_cost


@pytest.fixture(scope="module")
def recorder(static_cost):
    return sys.modules["recorder"]


@pytest.fixture
def committed():
    return json.loads(TABLE.read_text())


def test_costs_as_committed(static_cost):
    """The counts are those of the table, and every formula agrees with the bytes that the interpreter counts."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "benchmarks" / "static_cost.py"), "--check"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ours_cost_less(committed):
    for row in committed["costs"]:
        ours, others = row["ours"], (row["fairseq"], row["eager"])
        assert ours["syncs"] == 0, row
        # products and their weights take several launches a layer where PyTorch has one convolution
        assert row["op"] in PRODUCTS or all(ours["launches"] <= other["launches"] for other in others), row
        assert all(ours["bytes"] <= 1.001 * other["bytes"] for other in others), row


def test_front_end_keeps_little_for_backward(committed):
    """The limit is 60 % of what fairseq's front-end keeps."""
    saved = {
        (row["op"], row["workload"]): [row[side]["saved"] for side in ("ours", "fairseq")] for row in committed["costs"]
    }
    for norm in ("layer", "group"):
        ours, fairseq = saved["conv_encoder", f"speech base, {norm} norm"]
        assert 0 < ours <= 0.6 * fairseq, norm


def test_readme_shows_the_table(committed):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)`, (.*?) \| (\d+) → (\d+) \| (\d+) → (\d+) \| (\d+), (\d+) \|$", text, re.M)
    assert len(shown) >= 5
    rows = {(row["op"], row["workload"]): row for row in committed["costs"]}
    for op, workload, *numbers in shown:
        sides = [rows[op, workload][side] for side in ("fairseq", "ours", "eager")]
        fairseq, ours, eager = ((side["launches"], round(side["bytes"] / 1e6)) for side in sides)
        assert list(map(int, numbers)) == [fairseq[0], ours[0], fairseq[1], ours[1], *eager], (op, workload)


def test_differences_are_reported(static_cost, committed):
    rows = json.loads(TABLE.read_text())["costs"]
    assert static_cost.problems(rows, committed) == []
    rows[0]["ours"]["launches"] += 1
    rows[1]["eager"]["bytes"] += 1
    assert len(static_cost.problems(rows, committed)) == 2
    assert len(static_cost.problems(rows[:-1], committed)) == 3
    committed["torch"] = "1.0"  # whose eager code may launch other kernels
    assert len(static_cost.problems(rows, committed)) == 1


def test_wrong_formula_is_refused(static_cost):
    cost = next(cost for cost in static_cost.COSTS if cost.op == "l2_norm")
    exact = cost.formula(small=True)
    assert static_cost.formula_error(cost, 0, {"distinct": exact}) == 0
    assert static_cost.formula_error(cost, 10, {"distinct": exact + 10}) == 0
    with pytest.raises(ValueError, match=r"l2_norm.*off the bytes"):
        static_cost.formula_error(cost, 0, {"distinct": 2 * exact})


def test_recorder_counts_launches_and_bytes(recorder):
    x, row = torch.ones(8, 16), torch.ones(16)
    recording = recorder.record(lambda: (x.t() + row[:8].expand(16, 8)).to(torch.bfloat16))
    assert [name for name, *_ in recording.aten] == ["add", "_to_copy"]  # views cost nothing
    added, copied = 4 * (128 + 8 + 128), (4 + 2) * 128  # expanded elements are read once
    assert (recording.launches, recording.bytes, recording.syncs) == (2, added + copied, 0)
    assert recording.allocated == (4 + 2) * 128


def test_recorder_counts_what_is_mutated(recorder):
    params, grads, first, second = ([torch.ones(10), torch.ones(6)] for _ in range(4))
    assert recorder.record(lambda: torch._foreach_mul_(params, 2.0)).bytes == 2 * 4 * 16
    assert recorder.record(lambda: params[0].copy_(grads[0])).bytes == 2 * 4 * 10
    steps, options = [torch.ones(()), torch.ones(())], {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    options |= {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "grad_scale": torch.ones(())}
    lists = (params, grads, first, second, [], steps)
    fused = recorder.record(lambda: torch._fused_adamw_(*lists, **options))
    assert (fused.launches, fused.bytes) == (1, 2 * 4 * 4 * 16 + 3 * 4)  # under a scale, gradients are written as well


def test_recorder_sees_hidden_costs(recorder):
    x, mask = torch.ones(8, 16), torch.arange(8) < 3
    recording = recorder.record(lambda: x[mask])
    assert (recording.launches, recording.syncs, recording.allocated) == (4, 1, 3 * 16 * 4)
    assert recorder.record(lambda: x.sum().item()).syncs == 1
    recording = recorder.record(lambda: torch.nn.functional.layer_norm(x.t(), (8,)))
    assert [name for name, *_ in recording.aten] == ["contiguous", "native_layer_norm"]


def test_recorder_counts_what_autograd_keeps(recorder):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def kept(function):
        return recorder.record(lambda: function().sum().backward()).saved

    assert kept(lambda: x * weight[0]) == 0  # inputs only
    assert kept(lambda: (x @ weight).relu()) == 4 * 8 * 4
    assert kept(lambda: (x @ weight).view(2, 16).square()[:1]) == 4 * 8 * 4  # a storage counts whole, and once


def test_recorder_counts_convolutions(recorder):
    """With a bias, and an input that is not contiguous: copied, convolved, added; three gradients."""
    with torch.device("meta"):
        x = torch.empty(2, 10, 4, requires_grad=True)
        weight, bias = torch.empty(6, 4, 3, requires_grad=True), torch.empty(6, requires_grad=True)
    y_bytes, x_bytes, weight_bytes = 4 * 2 * 6 * 8, 4 * 2 * 10 * 4, 4 * 6 * 4 * 3
    recording = recorder.record(lambda: torch.nn.functional.conv1d(x.mT, weight, bias))
    assert recording.aten == [
        ("contiguous", 1, 2 * x_bytes),
        ("convolution", 1, x_bytes + weight_bytes + y_bytes),
        ("add_", 1, 2 * y_bytes),
    ]
    y = torch.nn.functional.conv1d(x.mT.contiguous(), weight, bias)
    recording = recorder.record(lambda: torch.autograd.grad(y, (x, weight, bias), torch.empty_like(y)))
    assert [entry for entry in recording.aten if entry[0] == "convolution_backward"] == [
        ("convolution_backward", 1, y_bytes + weight_bytes + x_bytes),
        ("convolution_backward", 1, y_bytes + x_bytes + weight_bytes),
        ("convolution_backward", 1, y_bytes + 4 * 6),
    ]


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be recorded")
def test_recorder_notes_the_extension(recorder):
    """The path of the extension, without it: which functions, how many kernels, what backward keeps."""
    from d2v_fast import ops

    weight = torch.zeros(64, 1, 10, dtype=torch.bfloat16, requires_grad=True)
    waves, one = torch.zeros(2, 325), torch.tensor([[0, 50]])
    kernels = {}
    for name, options in {
        "layer": {},
        "group": {"norm": "group"},
        "ranges": {"norm": "group", "segments": one},
    }.items():
        recording = recorder.record(
            lambda o=options: ops.conv0_norm_gelu(waves, weight, stride=5, **o).sum().backward()
        )
        kernels[name] = [entry[:2] for entry in recording.extension]
        assert recording.kernels == ["conv0_fwd_cuda", "conv0_bwd_cuda"]
        y_bytes = 2 * 2 * 64 * 64
        assert 0 < recording.saved < y_bytes / 4 and recording.bytes > 2 * y_bytes
    launches = {name: [count for _, count in found] for name, found in kernels.items()}
    assert launches == {"layer": [2, 4], "group": [4, 4], "ranges": [6, 5]}


def emulated_launches(function):
    """Kernels that the functions of the emulated extension launch, without running them."""
    library = ctypes.CDLL(str(emulator.library()))
    library.d2v_emulator_launches.restype = ctypes.c_char_p
    library.d2v_emulator_record(1)
    try:
        function()
        return len(library.d2v_emulator_launches().decode().splitlines())
    finally:
        library.d2v_emulator_record(0)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be recorded")
def test_recorder_counts_as_many_kernels_as_csrc_launches(recorder, emulated):
    from d2v_fast import ops

    weight = torch.zeros(64, 1, 10, dtype=torch.bfloat16, requires_grad=True)
    waves, one = torch.zeros(2, 325), torch.tensor([[0, 50]])
    x = torch.zeros(1, 20, 64, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.zeros(64, 32, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    calls = [
        lambda: ops.conv0_norm_gelu(waves, weight, stride=5),
        lambda: ops.conv0_norm_gelu(waves, weight, stride=5, norm="group"),
        lambda: ops.conv0_norm_gelu(waves, weight, stride=5, norm="group", segments=one),
        lambda: ops.pos_conv(x, weights, groups=2),
        lambda: ops.pos_conv(x, weights[:1], groups=2, norm=False),
    ]
    for call in calls:
        recording = recorder.record(lambda call=call: call().sum().backward())
        noted = sum(launches for _, launches, _ in recording.extension)
        assert noted == emulated_launches(lambda call=call: call().sum().backward()) > 0


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be recorded")
def test_recorder_follows_our_ops_below_autograd(recorder):
    from d2v_fast import ops

    pred = torch.zeros(6, 128, dtype=torch.bfloat16, requires_grad=True)
    recording = recorder.record(lambda: ops.masked_smooth_l1(pred, torch.zeros(6, 128)).backward())
    assert [launch.name for launch in recording.triton] == [
        "_masked_smooth_l1_fwd_kernel",
        "_masked_smooth_l1_bwd_kernel",
    ]
    assert [name for name, *_ in recording.aten] == ["zeros", "sum", "ones_like"]
    recording = recorder.record(lambda: ops.layer_targets([torch.zeros(2, 8, 16)] * 3, norm="batch"))
    assert "_layer_targets_kernel" in {launch.name for launch in recording.triton}


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([], 2, 0),
        ([1], 1, 1),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([65536 * 320], 2, 1),
        ([65536 * 320 + 1], 2, 2),
        ([65536 * 319, 65537], 2, 2),
    ],
)
def test_foreach_launches(recorder, sizes, lists, launches):
    assert recorder.foreach_launches(sizes, lists) == launches
