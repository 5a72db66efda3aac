"""Run by torchrun: updates of a tiny model on several ranks against the same updates of one process, and their traffic.

Rank 0 computes the reference, from the micro-batches of all ranks put together, once for all modes. Results go to a
JSON file.
"""

import json
import sys
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from distributed_traffic import Traffic
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.distributed.tensor import DTensor

from d2v_fast.nn import Batch, Data2Vec, make_batch
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.parallel import parallelise
from d2v_fast.train.step import Counts, train_step

UPDATES = 10
SIZE = 2  # rows of a micro-batch


def model_of(case: dict) -> Data2Vec:
    encoder = {**NO_DROPOUT, "layerdrop": case.get("layerdrop", 0.0), **case.get("encoder", {})}
    config = tiny_config(case["modality"], **encoder)
    if case["modality"] == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    if not case.get("token_weighted", True):
        config = replace(config, loss=replace(config.loss, token_weighted=False))
    if case.get("per") == "micro_batch":
        config = replace(config, ema=replace(config.ema, per="micro_batch"))
    torch.manual_seed(0)
    return Data2Vec(config).train()


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def state_of(model: Data2Vec) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def updates(case: dict, ranks: Ranks, batches_of) -> tuple[dict[str, torch.Tensor], list]:
    model = model_of(case)
    how = {"accumulate": case.get("accumulate", 1), "shard_size": case.get("shard_size", 0)}
    parallel = parallelise(model, ranks, **how)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, one_pass=case.get("one_pass", False)))
    rows = []
    for update in range(UPDATES):
        model.encoder.layerdrop_seed = update
        batches = batches_of(model.config, update)

        def counts(batches=batches):
            return Counts(*ranks.sum([*Counts.of(batches)]).read())

        metrics = train_step(
            model, batches, optimizer, lr=1e-3, update=update, clip_norm=0.5, parallel=parallel, counts=counts
        )
        own = [metrics.loss.item(), metrics.target_var.item(), metrics.pred_var.item()]
        rows.append([*map(sum, zip(*ranks.exchange(own), strict=True)), metrics.grad_norm.item()])
    return state_of(model), rows


def merged(batches: list[Batch]) -> Batch:
    inputs, masks = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "mask"))
    return make_batch(inputs, masks.numpy())


class Reference(NamedTuple):
    """What one process computes."""

    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    rows: list


REFERENCES: dict[str, Reference] = {}


def reference(case: dict, batches_of) -> Reference:
    key = json.dumps({name: value for name, value in case.items() if name not in ("mode", "shard_size")})
    if key not in REFERENCES:
        REFERENCES[key] = Reference(state_of(model_of(case)), *updates(case, Ranks.alone(), batches_of))
    return REFERENCES[key]


def compare(case: dict, ranks: Ranks) -> dict | None:
    """On rank 0, largest relative differences: of student, averages, and the logged loss and gradient norm."""
    accumulate = case.get("accumulate", 1)

    def micro_batch(config, update, number):
        return tiny_batch(config, 1000 * update + number, size=SIZE + number % 2)

    def mine(config, update):
        return [micro_batch(config, update, m * ranks.world_size + ranks.rank) for m in range(accumulate)]

    def together(config, update):
        """The ranks' micro-batches as one, or one for each turn where the teacher steps in between."""
        batches = [micro_batch(config, update, number) for number in range(ranks.world_size * accumulate)]
        if not case.get("token_weighted", True):
            return batches
        size = ranks.world_size if case.get("per") == "micro_batch" else len(batches)
        return [merged(batches[first : first + size]) for first in range(0, len(batches), size)]

    got, got_rows = updates(case, ranks, mine)
    if ranks.rank > 0:
        return None
    start, want, want_rows = reference(case, together)
    found = {}
    for part in ("student", "teacher"):
        names = [name for name in want if name.startswith("teacher.") == (part == "teacher")]
        gap = sum((got[name] - want[name]).double().square().sum() for name in names)
        size = sum(want[name].double().square().sum() for name in names)
        moved = sum((want[name] - start[name]).double().square().sum() for name in names)
        found[part] = (gap / size).sqrt().item()
        found[f"{part} moved"] = (moved / size).sqrt().item()
    for index, name in ((0, "loss"), (3, "grad_norm")):
        found[name] = max(abs(a[index] / b[index] - 1) for a, b in zip(got_rows, want_rows, strict=True))
    return found


def traffic(case: dict, ranks: Ranks) -> dict:
    """Collectives and bytes of an update, of them the teacher's, and bytes of parameters by where they are."""
    model, bf16 = model_of(case), case.get("bf16", False)
    nbytes = {"student": 0, "student layers": 0, "teacher": 0, "teacher layers": 0, "teacher frontend": 0}
    for name, p in model.named_parameters():
        part = "teacher" if name.startswith("teacher.") else "student"
        for key in (part, f"{part} layers" if "encoder.layers" in name else "", f"{part} frontend"):
            if key in nbytes and (not key.endswith("frontend") or "module.frontend" in name):
                nbytes[key] += p.nbytes
    shard_size = case.get("shard_size", 0)
    parallel = parallelise(model, ranks, accumulate=case["accumulate"], shard_size=shard_size, bf16=bf16)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    for update in range(4):  # DDP settles in the first three
        batches = [tiny_batch(model.config, 10 * update + m, size=2) for m in range(case["accumulate"])]
        with Traffic() as whole_update:
            metrics = train_step(
                model, batches, optimizer, lr=1e-3, update=update, clip_norm=0.5, autocast=bf16, parallel=parallel
            )
    with Traffic() as averages:
        model.teacher.update_(update + 1, again=True)
    own = [metrics.loss.item(), metrics.grad_norm.item()]
    counted = {"calls": whole_update.calls, "nbytes": whole_update.nbytes, "averages": averages.calls}
    return {"parameters": nbytes, "metrics": own, **counted}


def main() -> None:
    cases, target = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, case in cases.items():
        ranks = Ranks(rank, size, rank, size, torch.device("cpu"), case["mode"], 60.0, control)
        found[name] = (traffic if case.get("traffic") else compare)(case, ranks)
    if rank == 0:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
