"""Run by torchrun with one rank: updates with the process group that a GPU has (NCCL), or gloo with a CPU.

The second argument is the device. Every mode is compared with the same updates without one. Results to a JSON file.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import torch
from checks import no_synchronisation
from distributed_steps import model_of, state_of
from distributed_traffic import Traffic
from tiny import tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.train.distributed import DistributedConfig, Ranks, join
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.parallel import compile_layers, parallelise
from d2v_fast.train.seeds import seed_micro_batch
from d2v_fast.train.step import Counts, StepMetrics, train_step

UPDATES = 10
WARM_UP = 4  # updates after which nothing is set up any more: DDP's buckets, optimizer state, compiled kernels


class Averages(TorchDispatchMode):
    """Counts the launches that move the averages."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2v_fast":
            self.calls[function._schema.name.removeprefix("d2v_fast::")] += 1
        return function(*args, **(kwargs or {}))


class Run:
    """A tiny model with its optimizer, spread as ``ranks`` says."""

    def __init__(self, case: dict, ranks: Ranks) -> None:
        self.case, self.ranks, self.bf16 = case, ranks, case.get("bf16", False)
        self.model: Data2Vec = model_of(case).to(ranks.device)
        if case.get("compile"):
            compile_layers(self.model)
        how = {"accumulate": case.get("accumulate", 1), "shard_size": 1 if ranks.mode == "hsdp" else 0}
        self.parallel = parallelise(self.model, ranks, bf16=self.bf16, **how)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3, one_pass=case.get("one_pass", False)))

    def batches(self, update: int) -> list[Batch]:
        """On the host, page-locked where that is of use."""
        count = self.case.get("accumulate", 1)
        found = [tiny_batch(self.model.config, 100 * update + m, size=2 + update % 2) for m in range(count)]
        return [batch.pin_memory() for batch in found] if self.ranks.device.type == "cuda" else found

    def update(self, update: int, batches: list[Batch]) -> StepMetrics:
        """What the loop does, without what it logs."""
        self.model.encoder.layerdrop_seed = update
        pending = self.ranks.sum([*Counts.of(batches)])

        def prepare(index: int, batch: Batch) -> Batch:
            seed_micro_batch(1, update, index)
            return batch

        return train_step(
            self.model,
            [batch.to(self.ranks.device) for batch in batches],
            self.optimizer,
            lr=1e-3,
            update=update,
            clip_norm=0.5,
            autocast=self.bf16,
            parallel=self.parallel,
            counts=lambda: Counts(*pending.read()),
            prepare=prepare,
        )

    def train(self, updates: int) -> list[list[float]]:
        """Loss and gradient norm of each update."""
        metrics = [self.update(update, self.batches(update)) for update in range(updates)]
        return [[m.loss.item(), m.grad_norm.item()] for m in metrics]


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], teacher: bool) -> float:
    """Relative norm of the difference, of the averages or of all else."""
    names = [name for name in want if name.startswith("teacher.") == teacher]
    gap = sum((got[name] - want[name]).double().square().sum() for name in names)
    return (gap / sum(want[name].double().square().sum() for name in names)).sqrt().item()


def compare(case: dict, ranks: Ranks) -> dict:
    """Relative differences to the same updates alone, and how far these went."""
    alone = Run({**case, "compile": False}, Ranks.alone(ranks.device))
    start = state_of(alone.model)
    want_rows, want = alone.train(UPDATES), state_of(alone.model)
    run = Run(case, ranks)
    got_rows, got = run.train(UPDATES), state_of(run.model)
    found = {"finite": all(x.isfinite().all().item() for x in got.values())}
    for part, teacher in (("student", False), ("teacher", True)):
        found[part], found[f"{part} moved"] = distance(got, want, teacher), distance(want, start, teacher)
    for index, name in enumerate(("loss", "grad_norm")):
        found[name] = max(abs(a[index] / b[index] - 1) for a, b in zip(got_rows, want_rows, strict=True))
    return found


def host(case: dict, ranks: Ranks) -> dict:
    """One update that must not wait for the device; then the averages alone: their launches and collectives."""
    run = Run(case, ranks)
    run.train(WARM_UP)
    batches = run.batches(WARM_UP)
    with no_synchronisation() if ranks.device.type == "cuda" else nullcontext():
        metrics = run.update(WARM_UP, batches)
    with Averages() as averages, Traffic() as traffic:
        run.model.teacher.update_(WARM_UP + 1, again=True)
    return {"loss": metrics.loss.item(), "averages": averages.calls, "traffic": traffic.calls}


def main() -> None:
    cases, target, device = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    with join(DistributedConfig(mode="ddp", timeout=120), device) as ranks:
        for name, case in cases.items():
            waits = case.get("host", False)
            torch.use_deterministic_algorithms(not waits, warn_only=True)
            found[name] = (host if waits else compare)(case, replace(ranks, mode=case["mode"]))
        backend = torch.distributed.get_backend()
    with open(target, "w", encoding="utf-8") as file:
        json.dump({"backend": backend, "cases": found}, file)


if __name__ == "__main__":
    main()
