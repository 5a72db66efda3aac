"""Updates with one rank, over NCCL on a GPU: the numbers of one process, without waiting for the device.

A process group of one rank runs whatever several do, but what they send. On the CPU the same script runs over gloo, for
text alone; two ranks are in ``test_distributed_steps.py``.
"""

import json

import pytest
import torch.distributed as dist
from checks import INTERPRET
from torchrun import HERE, torchrun

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")

# What kernels drop depends on the order in which they draw. Pre-norm layers that are sharded draw outside of the fused
# op what they draw inside of it elsewhere, so that images have DropPath alone here, as in their recipes.
DROPOUT = {modality: {"dropout": 0.1, "attention_dropout": 0.1} for modality in ("speech", "text")}
DROPOUT["image"] = {"drop_path": 0.2}


def cases_of(modality: str) -> dict[str, dict]:
    """What a GPU runs of a modality, in float32 and in bfloat16, and without waiting."""
    cases = {}
    for mode in ("ddp", "fsdp2", "hsdp") if modality == "text" else ("ddp", "fsdp2"):
        case = {"modality": modality, "mode": mode}
        cases[f"{mode} AdamW"] = {**case, "accumulate": 2, "encoder": DROPOUT[modality], "layerdrop": 0.3}
        cases[f"{mode} AdamWEMA"] = {**case, "one_pass": True}
        cases[f"{mode} bfloat16"] = {**case, "bf16": True}
        cases[f"{mode} host"] = {**case, "host": True, "bf16": True, "accumulate": 2}
    for checkpointing in ("full", "selective"):
        how = {"encoder": {**DROPOUT[modality], "checkpointing": checkpointing}}
        cases[f"fsdp2 {checkpointing} checkpointing"] = {"modality": modality, "mode": "fsdp2", **how}
    return cases


GPU = {modality: cases_of(modality) for modality in ("speech", "image", "text")}
GPU["compiled"] = {
    f"{mode} compiled": {"modality": "text", "mode": mode, "compile": True, "bf16": True} for mode in ("ddp", "fsdp2")
}
ON_CPU = ("ddp AdamW", "fsdp2 AdamW", "hsdp AdamWEMA", "fsdp2 bfloat16", "fsdp2 host")


def run(cases: dict[str, dict], device: str, folder) -> dict[str, dict]:
    """What ``distributed_gpu.py`` finds; one launch, as a process takes seconds to start."""
    target = folder / "found.json"
    # for deterministic products of cuBLAS
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    script, timeout = str(HERE / "distributed_gpu.py"), 110 if device == "cuda" else 240
    done = torchrun(1, script, json.dumps(cases), str(target), device, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["backend"] == {"cuda": "nccl", "cpu": "gloo"}[device]
    return found["cases"]


def wrong(name: str, case: dict, got: dict) -> list[str]:
    """What is not as it should be of a case."""
    if case.get("host"):
        # replicas have bfloat16 copies of their matrices: these and the rest are two lists
        launches = 2 if case["mode"] == "ddp" and case.get("bf16") else 1
        well = 0 < got["loss"] < 10 and got["averages"] == {"ema_update_": launches} and got["traffic"] == {}
        return [] if well else [f"{name}: {got}"]
    if case.get("bf16"):  # with shards, norms and biases of layers are rounded to bfloat16
        limits = {"student": 0.1 * got["student moved"], "teacher": 0.1 * got["teacher moved"]}
        limits |= {"loss": 0.05, "grad_norm": 0.1}
    else:
        limits = {"student": 1e-5, "teacher": 1e-5, "loss": 1e-4, "grad_norm": 1e-4}
    well = got["finite"] and got["student moved"] > 5e-4 and got["teacher moved"] > 5e-4
    well = well and all(got[key] <= limit for key, limit in limits.items())
    return [] if well else [f"{name}: {got}"]


def check(cases: dict[str, dict], device: str, folder) -> None:
    found = run(cases, device, folder)
    bad = [line for name, case in cases.items() for line in wrong(name, case, found[name])]
    assert not bad, "\n".join(bad)


def test_one_rank_on_the_cpu(tmp_path):
    check({name: GPU["text"][name] for name in ON_CPU}, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs NCCL")
@pytest.mark.parametrize("group", GPU)
def test_one_rank_on_a_gpu(tmp_path, group):
    """Ten updates equal those of one process; none waits for the device; averages take a launch or two, no traffic."""
    check(GPU[group], "cuda", tmp_path)
