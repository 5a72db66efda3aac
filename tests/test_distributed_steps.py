"""Updates on several ranks: the same numbers as one process computes, and what they communicate, counted."""

import pytest
import torch.distributed as dist
from checks import INTERPRET
from torchrun import launch

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")

MODALITIES = ("speech", "image", "text")
EQUAL = {
    f"{modality} {mode} {optimizer}": {"modality": modality, "mode": mode, "one_pass": optimizer == "AdamWEMA"}
    for modality in MODALITIES
    for mode, optimizer in (("ddp", "AdamW"), ("ddp", "AdamWEMA"), ("fsdp2", "AdamW"), ("fsdp2", "AdamWEMA"))
}
for mode in ("ddp", "fsdp2"):
    EQUAL |= {
        f"accumulated {mode}": {"modality": "text", "mode": mode, "accumulate": 2},
        # the second: in some updates no layer is left
        f"LayerDrop {mode}": {"modality": "text", "mode": mode, "accumulate": 2, "layerdrop": 0.5},
        f"LayerDrop of images {mode}": {"modality": "image", "mode": mode, "layerdrop": 0.5, "one_pass": True},
        f"means of micro-batches {mode}": {
            "modality": "image",
            "mode": mode,
            "token_weighted": False,
            "accumulate": 2,
        },
        f"teacher steps each micro-batch {mode}": {
            "modality": "text",
            "mode": mode,
            "per": "micro_batch",
            "accumulate": 2,
        },
    }
for checkpointing in ("full", "selective"):
    for modality in ("speech", "image"):
        EQUAL[f"{checkpointing} checkpointing {modality}"] = {
            "modality": modality,
            "mode": "fsdp2",
            "encoder": {"checkpointing": checkpointing},
        }
EQUAL |= {
    "uneven shards": {"modality": "text", "mode": "fsdp2", "encoder": {"dim": 33, "heads": 3, "ffn_dim": 49}},
    "hsdp, replicas": {"modality": "text", "mode": "hsdp", "shard_size": 1, "accumulate": 2},
    "hsdp, shards": {"modality": "image", "mode": "hsdp", "shard_size": 2, "one_pass": True},
}
TRAFFIC = {
    f"{modality} {mode} x {accumulate}": {
        "traffic": True,
        "modality": modality,
        "mode": mode,
        "accumulate": accumulate,
    }
    for modality, mode, accumulate in (
        *((modality, mode, 1) for modality in MODALITIES for mode in ("ddp", "fsdp2")),
        ("text", "ddp", 3),
        ("text", "fsdp2", 3),
    )
}
TRAFFIC["replicas"] = {"traffic": True, "modality": "text", "mode": "hsdp", "accumulate": 2, "shard_size": 1}
TRAFFIC["bfloat16"] = {"traffic": True, "modality": "text", "mode": "fsdp2", "accumulate": 1, "bf16": True}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launch("distributed_steps.py", {**EQUAL, **TRAFFIC}, tmp_path_factory.mktemp("steps"), ranks=2)


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_equal_one_process(found, name):
    """Ten updates; differences are compared with how far student and teacher have moved."""
    got = found[name]
    for part in ("student", "teacher"):
        assert got[part] < 1e-6 and got[part] < 1e-5 * got[f"{part} moved"], got
        assert got[f"{part} moved"] > 5e-4
    assert got["loss"] < 1e-5 and got["grad_norm"] < 1e-5


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_of_an_update(found, name):
    """The formulas of docs/distributed.md; the teacher's averages need nothing."""
    case, got = TRAFFIC[name], found[name]
    size, nbytes, calls, times = got["parameters"], got["nbytes"], got["calls"], case["accumulate"]
    assert got["averages"] == {}
    if case["mode"] == "ddp":
        assert nbytes == {"allreduce_": size["student"]} and calls == {"allreduce_": 1}  # one bucket of 25 MiB
        return
    if case["mode"] == "hsdp":  # a shard is the whole here
        assert nbytes == {"allreduce_": size["student"] + 8} and calls == {"allreduce_": 4 + 1}
        return
    shared = size["teacher frontend"] if case["modality"] == "text" else 0  # the student's own, see EMATeacher.skip
    narrow = 2 if case.get("bf16") else 1
    layers = (2 * size["student layers"] + size["teacher layers"]) // narrow
    rest = size["student"] - size["student layers"] + size["teacher"] - size["teacher layers"] - shared
    assert nbytes == {
        "_allgather_base_": times * (layers + rest),
        "_reduce_scatter_base_": size["student"],
        "allreduce_": 8,
    }
    assert calls["_reduce_scatter_base_"] == 4 and calls["allreduce_"] == 1  # three layers and the rest; the norm
    groups = {"speech": 2, "image": 3, "text": 1}[case["modality"]]  # of the student's rest and the teacher's
    assert calls["_allgather_base_"] == times * (3 + 3 + 3 + groups)


def test_layers_gathered_in_bfloat16_train(found):
    """Gradients are summed in float32; the loss stays near that of float32."""
    narrow, wide = (found[name]["metrics"] for name in ("bfloat16", "text fsdp2 x 1"))
    assert narrow == pytest.approx(wide, rel=0.05) and narrow != wide
