"""Whole training steps (forward, backward, AdamW, teacher): fairseq's and BEiT's as written, patched, and ours.

python benchmarks/bench_train_step.py --smoke                 # CPU, float32: one ratio for each modality
python benchmarks/bench_train_step.py --modality text --rounds 5
python benchmarks/bench_train_step.py --json out.json         # GPU: step_gpu.py says what is measured there

On a CPU: speech base on 2 clips of 5 s, text base on 4 rows of 512 tokens (the teacher reads the masked ones, as
released), ViT-B on 2 images. All sides run in one process on the same inputs and masks, taking turns; before anything
is timed, their losses must be equal, with equal weights, and without dropout. "patched" is the peer with
``d2v_fast.patch``: its own model and optimizer, our ops. Without ve-fairseq
(requirements/peers.txt) only the image step has a peer.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import step_peers
import torch
from common import DEVICE, write_json
from step_peers import Peer

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

OPTIM = OptimConfig(lr=5e-4)
SIZES = {"speech": (2, 5 * 16_000), "text": (4, 512), "image": (2, 224)}  # rows; samples, tokens or pixels
FIRST = {"speech": (2, 16_000), "text": (1, 32), "image": (1, 224)}  # of the step that allocates and is not timed
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}


def make_config(modality: str, dropout: bool = True, layers: int = 12) -> Data2VecConfig:
    """The released base recipe, without LayerDrop, which would make the two sides do different work in a round."""
    config = getattr(Data2VecConfig, modality)(profile="fairseq")
    encoder = replace(config.encoder, layerdrop=0.0, layers=layers, **({} if dropout else NO_DROPOUT))
    frontend = config.frontend
    if modality == "text" and not dropout:
        frontend = replace(frontend, dropout=0.0)
    top_k = min(config.targets.top_k, layers)
    return replace(config, encoder=encoder, frontend=frontend, targets=replace(config.targets, top_k=top_k))


def random_batch(config: Data2VecConfig, rows: int, size: int, static: bool = False) -> Batch:
    """Noise, and a mask of the recipe; ``static`` computes as many masked rows as any mask can have."""
    frontend = config.frontend
    if config.modality == "text":
        inputs = torch.randint(4, frontend.vocab_size - 1, (rows, size))
    else:
        inputs = torch.randn((rows, size) if config.modality == "speech" else (rows, 3, size, size))
    positions = {
        "speech": lambda: frontend.num_frames(size),
        "text": lambda: size,
        "image": lambda: frontend.num_patches,
    }
    T = positions[config.modality]()
    mask = config.mask.draw(np.random.default_rng(0), np.full(rows, T), T)
    return make_batch(inputs, mask, num_masked=rows * config.mask.most(T) if static else None).to(DEVICE)


def our_step(model: Data2Vec) -> Callable[[Batch], None]:
    """One update of ``model``."""
    optimizer, autocast, updates = build_optimizer(model, OPTIM), DEVICE.type == "cuda", iter(range(1_000_000))

    def step(batch: Batch) -> None:
        train_step(model, [batch], optimizer, lr=OPTIM.lr, update=next(updates), autocast=autocast)

    return step


def peer_step(peer: Peer) -> Callable[[Batch], None]:
    """One update of ``peer``."""
    settings = {"lr": OPTIM.lr, "betas": OPTIM.betas, "eps": OPTIM.eps, "weight_decay": OPTIM.weight_decay}
    optimizer, updates = peer.adamw(peer.parameters, **settings), iter(range(1, 1_000_000))

    def step(batch: Batch) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = peer.loss(batch)
        loss.backward()
        peer.norm(peer.parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peer.follow(next(updates))

    return step


def check_equal_losses(modality: str) -> None:
    """Refuse to time two models that do not compute the same thing; two layers of the full width show it."""
    torch.manual_seed(1)
    ours = Data2Vec(make_config(modality, dropout=False, layers=2)).to(DEVICE).train()
    peer = step_peers.load(ours)
    if peer is None:
        return
    batch = random_batch(ours.config, *FIRST[modality])
    with torch.no_grad():
        wanted = peer.loss(batch).item()
        patch = peer.patch()
        print(patch)
        found = {"d2v_fast": ours(batch).loss.item() / batch.num_masked, "patched": peer.loss(batch).item()}
    for name, loss in found.items():
        apart = abs(loss - wanted) / wanted
        print(f"{modality}: loss on equal weights: {name} {loss:.6f}, {peer.name} {wanted:.6f}, apart {apart:.1e}")
        if not apart <= (1e-5 if DEVICE.type == "cpu" else 1e-4):  # convolutions are TF32 there
            sys.exit("the losses differ: nothing was timed")


@dataclass
class Taken:
    """Seconds of every round: by the clock, and of processor time, which other programs lengthen less."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def measure(modality: str, rounds: int, layers: int = 12) -> dict[str, Taken]:
    """All sides, taking turns; the first name is the peer's, if there is one."""
    torch.manual_seed(0)
    model = Data2Vec(make_config(modality, layers=layers)).to(DEVICE).train()
    peer, steps = step_peers.load(model), {}
    if peer is not None:
        patched = step_peers.load(model)
        patched.patch()
        steps = {peer.name: peer_step(peer), "patched": peer_step(patched)}
    steps["d2v_fast"] = our_step(model)
    for step in steps.values():
        step(random_batch(model.config, *FIRST[modality]))
    batch = random_batch(model.config, *SIZES[modality])
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


def on_cpu(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios for each modality."""
    results = {}
    for modality in args.modality:
        taken = measure(modality, 1 if args.smoke else args.rounds, args.layers)
        rows, size = SIZES[modality]
        if len(taken) == 1:
            print(f"{modality} base, {rows} x {size}: nothing to compare with is installed")
            continue
        results[modality] = ratios(taken)
        for name, r in results[modality].items():
            print(
                f"{modality} base, {rows} x {size}, {args.threads} threads: {next(iter(taken))} / {name} = "
                f"{r['wall']:.2f} ({r['least']:.2f} to {r['most']:.2f}; processor time {r['processor']:.2f})",
                flush=True,
            )
    return results


def on_gpu(args: argparse.Namespace) -> list[dict]:
    """A row for each modality and provider."""
    import step_gpu

    deadline, rows = time.monotonic() + args.budget, []
    for index, modality in enumerate(args.modality, start=1):
        config = make_config(modality, layers=args.layers)
        batch = random_batch(config, *step_gpu.SIZES[modality], static=True)
        left = max(deadline - time.monotonic(), 0) / (len(args.modality) - index + 1)
        until = time.monotonic() + 0.7 * left
        found = step_gpu.measure(
            config, batch, args.providers or step_gpu.PROVIDERS, args.rounds, OPTIM, peer_step, until
        )
        print("\n".join(map(step_gpu.line, found)), flush=True)
        rows += found
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one round")
    parser.add_argument("--modality", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--providers", nargs="+", help="on a GPU; see step_gpu.py")
    parser.add_argument("--budget", type=float, default=math.inf, help="on a GPU: seconds in which steps are begun")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for modality in args.modality:
        check_equal_losses(modality)
    results = (on_gpu if DEVICE.type == "cuda" else on_cpu)(args)
    if args.json:
        record = {
            "benchmark": "train_step",
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "results": results,
        }
        write_json(args.json, record, args.commit)


if __name__ == "__main__":
    main()
