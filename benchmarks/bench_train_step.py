"""Whole training steps (forward, backward, AdamW, teacher): fairseq's and BEiT's as written, patched, and ours.

python benchmarks/bench_train_step.py --smoke                 # CPU, float32: one ratio for each modality
python benchmarks/bench_train_step.py --modality text --rounds 5
python benchmarks/bench_train_step.py --recipe speech_base --json out.json --resume      # GPU; step_gpu.py says what

On a CPU: speech base on 2 clips of 5 s, text base on 4 rows of 512 tokens (the teacher reads the masked ones, as
released), ViT-B on 2 images. All sides run in one process on the same inputs and masks, taking turns. "patched" is the
peer with ``d2v_fast.patch``: its own model and optimizer, our ops. Without ve-fairseq (requirements/peers.txt) speech
and text are compared with its restatement in plain PyTorch (``reference_*.py``), which is not patched.

On a GPU: the published recipes at their batch for one GPU (``step_recipes.py``), a provider after the other. A provider
that runs out of memory or fails is a row that says so; one that leaves an unusable device ends the process. The file is
written after each provider; ``--resume`` keeps its rows of the same code, on the same device and PyTorch, and tries
those again last that failed. torch.compile comes behind all other providers of all recipes. Where another machine has
timed some providers of a recipe and others are left, all are timed again: its rows get no ratios.

Before anything is timed, losses and norms of the gradients of all sides must be equal, with equal weights and without
dropout, for two layers of the full width in float32.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import checkout  # noqa: F401
import step_peers
import step_plain
import torch
from cli import earlier
from common import DEVICE, environment, write_json
from step_recipes import RECIPES, make_config, random_batch
from torch import Tensor, nn

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

OPTIM = OptimConfig(lr=5e-4)
SIZES = {"speech": (2, 5 * 16_000), "text": (4, 512), "image": (2, 224)}  # rows; samples, tokens or pixels
FIRST = {"speech": (2, 16_000), "text": (1, 32), "image": (1, 224)}  # of the step that allocates and is not timed
# relative, of losses and of norms of gradients; a GPU adds in another order (without TF32)
APART = {"loss": 1e-5, "norm": 1e-4} if DEVICE.type == "cpu" else {"loss": 1e-4, "norm": 1e-3}


def our_step(model: Data2Vec) -> Callable[[Batch], None]:
    """One update of ``model``."""
    optimizer, autocast, updates = build_optimizer(model, OPTIM), DEVICE.type == "cuda", iter(range(1_000_000))

    def step(batch: Batch) -> None:
        train_step(model, [batch], optimizer, lr=OPTIM.lr, update=next(updates), autocast=autocast)

    return step


def loss_and_norm(loss: Tensor, parameters: list[nn.Parameter]) -> dict[str, float]:
    """A loss, and the norm of its gradients, which are gone afterwards."""
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for p in parameters:
        p.grad = None
    return {"loss": loss.item(), "norm": norm.item()}


def check_equal(modality: str, model: str = "base") -> None:
    """Refuse to time models that do not compute the same thing; two layers of the full width show it."""
    with step_peers.tf32(products=False, convolutions=False):
        _check_equal(modality, model)


def _check_equal(modality: str, model: str) -> None:
    torch.manual_seed(1)
    config = make_config(modality, model, dropout=False, layers=2)
    with DEVICE:
        ours, plain = Data2Vec(config).train(), Data2Vec(step_plain.plain_config(config)).train()
    peer = step_peers.load(ours)
    plain.load_state_dict(ours.state_dict())
    batch = random_batch(config, *FIRST[modality]).to(DEVICE)

    def of(side: Data2Vec) -> dict[str, float]:
        parameters = [p for p in side.parameters() if p.requires_grad]
        return loss_and_norm(side(batch).loss / batch.num_masked, parameters)

    wanted = loss_and_norm(peer.loss(batch), peer.parameters)
    found = {"d2v_fast": of(ours)}
    with step_plain.plain_ops():
        found["eager"] = of(plain)
    if peer.patch is not None:
        print(peer.patch())
        found["patched"] = loss_and_norm(peer.loss(batch), peer.parameters)
    for name, values in found.items():
        apart = {what: abs(values[what] - wanted[what]) / wanted[what] for what in wanted}
        words = [f"{what} {values[what]:.6f}, {wanted[what]:.6f}, apart {apart[what]:.1e}" for what in wanted]
        print(f"{modality} {model} on equal weights, {name} and {peer.name}: " + "; ".join(words), flush=True)
        if not all(apart[what] <= APART[what] for what in apart):
            sys.exit("losses or gradients differ: nothing was timed")


@dataclass
class Taken:
    """Seconds of every round: by the clock, and of processor time, which other programs lengthen less."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def measure(modality: str, rounds: int, layers: int | None = None) -> dict[str, Taken]:
    """All sides on a CPU, taking turns; the first name is the peer's."""
    torch.manual_seed(0)
    model = Data2Vec(make_config(modality, layers=layers)).to(DEVICE).train()
    peer = step_peers.load(model)
    steps = {peer.name: step_peers.autocast_step(peer, OPTIM)}
    if peer.patch is not None:
        patched = step_peers.load(model)
        patched.patch()
        steps["patched"] = step_peers.autocast_step(patched, OPTIM)
    steps["d2v_fast"] = our_step(model)
    for step in steps.values():
        step(random_batch(model.config, *FIRST[modality]).to(DEVICE))
    batch = random_batch(model.config, *SIZES[modality]).to(DEVICE)
    taken = {name: Taken() for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step(batch)
            taken[name].wall.append(time.perf_counter() - wall)
            taken[name].processor.append(time.process_time() - processor)
    return taken


def ratios(taken: dict[str, Taken]) -> dict[str, dict[str, float]]:
    """The peer's time over each other side's, of the fastest rounds; and the slowest and fastest round by the clock."""
    theirs, *others = taken.values()
    found = {}
    for name, side in zip(list(taken)[1:], others, strict=True):
        rounds = [a / b for a, b in zip(theirs.wall, side.wall, strict=True)]
        found[name] = {
            "wall": min(theirs.wall) / min(side.wall),
            "processor": min(theirs.processor) / min(side.processor),
            "least": min(rounds),
            "most": max(rounds),
        }
    return found


def on_cpu(args: argparse.Namespace) -> None:
    """Ratios for each modality."""
    results = {}
    for modality in args.modality:
        check_equal(modality)
    for modality in args.modality:
        taken = measure(modality, 1 if args.smoke else args.rounds, args.layers)
        rows, size = SIZES[modality]
        results[modality] = ratios(taken)
        for name, r in results[modality].items():
            print(
                f"{modality} base, {rows} x {size}, {args.threads} threads: {next(iter(taken))} / {name} = "
                f"{r['wall']:.2f} ({r['least']:.2f} to {r['most']:.2f}; processor time {r['processor']:.2f})",
                flush=True,
            )
    if args.json:
        arguments = {k: str(v) for k, v in vars(args).items()}
        write_json(args.json, {"benchmark": "train_step", "arguments": arguments, "results": results}, args.commit)


class Results:
    """Rows by recipe and provider, and the file that they are in after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.commit = args.json, args.commit
        self.record = {"benchmark": "train_step", "layers": args.layers, "smoke": args.smoke}
        before = []
        if args.json and args.resume:
            before = earlier(Path(args.json), self.record, environment(args.commit))
        self.rows = {(row["case"], row["provider"]): row for row in before}
        self.tried = {key for key, row in self.rows.items() if row["status"].startswith("failed")}
        self.rates: dict[str, float | None] = {}

    def left(self, recipe: str, names: list[str], machine: str) -> list[str]:
        """What there is no row of, or has failed; if there is any, what another machine has timed too."""
        missing = [n for n in names if (recipe, n) not in self.rows or (recipe, n) in self.tried]
        if not missing:
            return []
        rows = {n: self.rows.get((recipe, n), {}) for n in names}
        return [n for n in names if n in missing or (rows[n]["status"] == "ok" and rows[n].get("machine") != machine)]

    def tries(self, recipe: str, name: str) -> int:
        """How often it has failed."""
        return self.rows[recipe, name].get("tries", 1) if (recipe, name) in self.tried else 0

    def add(self, row: dict, relate: Callable[[list[dict]], None]) -> None:
        """Put ``row`` in the place of the one before; ``relate`` adds to the rows of a recipe what compares them."""
        self.rows[row["case"], row["provider"]] = row
        relate([other for other in self.rows.values() if other["case"] == row["case"]])
        complete = not any(other["status"].startswith(("skipped", "failed")) for other in self.rows.values())
        if self.path:
            content = {**self.record, **self.rates, "complete": complete, "results": list(self.rows.values())}
            write_json(self.path, content, self.commit)


def on_gpu(args: argparse.Namespace) -> list[dict]:
    """A row for each recipe and provider."""
    import step_gpu

    results, deadline, machine = Results(args), time.monotonic() + args.budget, step_gpu.machine()
    counts = step_gpu.Counts(2, 3, 1) if args.smoke else step_gpu.Counts(args.warm_up, args.rounds)
    groups: dict[tuple[int, bool, int], list[str]] = {}  # what has failed and what is compiled comes last, over all
    for number, recipe in enumerate(args.recipe):
        wanted = args.providers or step_gpu.providers_of(RECIPES[recipe].modality)
        for name in results.left(recipe, wanted, machine):
            key = results.tries(recipe, name), name == step_gpu.COMPILED, number
            groups.setdefault(key, []).append(name)
    shares, rates, checked = sum(step_gpu.share(name) for names in groups.values() for name in names), None, set()
    for (tries, _, number), names in sorted(groups.items()):
        recipe = args.recipe[number]
        made = RECIPES[recipe]
        if recipe not in checked:
            check_equal(made.modality, made.model)
            checked.add(recipe)
        rates = rates or step_gpu.device_rates()
        results.rates = {"matmul_tflop_per_s": rates.matmul, "peak_tflop_per_s": rates.peak}
        torch.manual_seed(0)
        config = make_config(made.modality, made.model, layers=args.layers)
        batches = {}
        for static in (False, True):
            batches[static] = random_batch(config, made.rows, made.size, static=static).to(DEVICE)
        about = {"case": recipe, "modality": made.modality, "layers": config.encoder.layers, "dim": config.encoder.dim}
        for name in names:
            batch = batches[name == step_gpu.GRAPH]
            row = {**about, "batch": list(batch.inputs.shape), "provider": name, "machine": machine}
            part = step_gpu.share(name)
            seconds, shares = (deadline - time.monotonic()) * part / shares, shares - part
            if seconds > 0:
                failed = {"status": step_gpu.STOPPED, "tries": tries + 1}
                results.add(row | failed, step_gpu.relate)
                row |= step_gpu.measure(name, config, batch, made.optim, rates, counts, seconds)
                row |= {"tries": tries + 1} if row["status"].startswith("failed") else {}
            elif (recipe, name) in results.rows:  # of another machine, or its failure: says more than this would
                continue
            else:
                row |= {"status": step_gpu.OUT_OF_TIME}
            results.add(row, step_gpu.relate)
            print(step_gpu.line(row), flush=True)
            if row.get("device_lost"):
                sys.exit(
                    f"{recipe} {name} left a device on which nothing can be measured: {row['status']}; the same "
                    "command with --resume goes on with the others"
                )
        del batches, batch
    return list(results.rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one round; on a GPU three, of two layers")
    parser.add_argument("--modality", nargs="+", choices=list(SIZES), help="on a CPU (default: all)")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), help="on a GPU (default: all)")
    parser.add_argument("--rounds", type=int, help="timed updates (default: 3 on a CPU, at most 200 on a GPU)")
    parser.add_argument("--warm-up", type=int, default=50, help="on a GPU: at most so many updates before")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--providers", nargs="+", help="on a GPU; see step_gpu.py")
    parser.add_argument("--budget", type=float, default=math.inf, help="on a GPU: seconds in which steps are begun")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--resume", action="store_true", help="on a GPU: keep what the file has from an earlier run")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    gpu = DEVICE.type == "cuda"
    refused = args.modality if gpu else args.recipe
    if refused:
        parser.error("on a GPU give --recipe, not --modality" if gpu else "--recipe needs a GPU, here give --modality")
    if not gpu:
        args.modality, args.rounds = args.modality or list(SIZES), args.rounds or 3
        on_cpu(args)
        return
    args.recipe, args.rounds = args.recipe or list(RECIPES), args.rounds or 200
    args.layers = args.layers or (2 if args.smoke else None)
    failed = [row for row in on_gpu(args) if row["status"].startswith("failed")]
    if failed:
        sys.exit("failed: " + ", ".join(f"{r['case']} {r['provider']}" for r in failed))


if __name__ == "__main__":
    main()
