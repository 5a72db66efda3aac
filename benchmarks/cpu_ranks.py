"""What several ranks on a CPU lose to each other: updates of one rank alone, and of ranks that train together.

python benchmarks/cpu_ranks.py --ranks 2 --threads 1     # ratios of speed per rank; nothing else should be running

Every rank has the same model, batches of the same size, and its own threads, so that without any loss an update takes
as long on all of them as on one. "side by side" are as many processes that do not know of each other: what they lose is
the machine's (shared caches, memory, hyper-threads), and the rest is ours. Kinds take turns; times are medians of a
turn's updates, and the fastest turn counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import checkout  # noqa: F401
import numpy as np
import torch

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.distributed import DistributedConfig, join
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.parallel import parallelise
from d2v_fast.train.step import Counts, train_step

KINDS = ("alone", "side by side", "ddp", "fsdp2")
WARM_UP = 3  # updates


def model_config(dim: int, layers: int) -> Data2VecConfig:
    """The text recipe with a smaller encoder; without LayerDrop all updates are alike."""
    config = Data2VecConfig.text()
    encoder = replace(config.encoder, dim=dim, ffn_dim=4 * dim, heads=dim // 64, layers=layers, layerdrop=0.0)
    targets = replace(config.targets, top_k=min(config.targets.top_k, layers))
    return replace(config, encoder=encoder, targets=targets, frontend=replace(config.frontend, vocab_size=8000))


def random_batch(config: Data2VecConfig, seed: int, size: int, length: int) -> Batch:
    """Blocks of random tokens."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(4, config.frontend.vocab_size - 1, (size, length)))
    return make_batch(tokens, config.mask.draw(rng, np.full(size, length), length))


def worker(options: argparse.Namespace) -> None:
    """Time this rank's updates; rank 0 prints the median in seconds."""
    torch.set_num_threads(options.threads)
    mode = options.worker if options.worker in ("ddp", "fsdp2") else "none"
    config = model_config(options.dim, options.layers)
    with join(DistributedConfig(mode=mode, timeout=120), "cpu") as ranks:
        torch.manual_seed(0)
        model = Data2Vec(config)
        parallel = parallelise(model, ranks)
        optimizer = build_optimizer(model, OptimConfig())
        seconds = []
        for update in range(WARM_UP + options.updates):
            batch = random_batch(config, 100 * update + ranks.rank, options.batch, options.length)
            begun = time.perf_counter()
            total = ranks.sum(Counts.of([batch]))

            def counts(total=total) -> Counts:
                return Counts(*total.read())

            train_step(model, [batch], optimizer, lr=1e-4, update=update, parallel=parallel, counts=counts)
            seconds.append(time.perf_counter() - begun)
        if ranks.first:
            print(json.dumps(statistics.median(seconds[WARM_UP:])))


def turn(kind: str, options: argparse.Namespace) -> float:
    """Seconds of an update of one kind, by processes of its own."""
    python = [sys.executable]
    if kind in ("ddp", "fsdp2"):
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    names = ("threads", "updates", "batch", "length", "dim", "layers")
    values = [f"--{name}={getattr(options, name)}" for name in names]
    command = [*python, str(Path(__file__).resolve()), f"--worker={kind}", *values]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": path}
    count = options.ranks if kind == "side by side" else 1
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen(command, **pipes) for _ in range(count)]
    found = []
    for process in running:
        out, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)
        found.append(float(out.splitlines()[-1]))
    return max(found)


def main() -> None:
    """Run all kinds in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"ranks": 2, "threads": 1, "turns": 3, "updates": 10, "batch": 8, "length": 256, "dim": 256, "layers": 6}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options)
        return
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(options.turns):
        for kind in KINDS:
            best[kind] = min(best[kind], turn(kind, options))
    size = sum(p.numel() for p in Data2Vec(model_config(options.dim, options.layers)).parameters() if p.requires_grad)
    print(
        f"{options.ranks} ranks of {options.threads} thread(s), {size / 1e6:.1f} M parameters, on {os.cpu_count()} CPUs"
    )
    print("kind           speed per rank, of one alone   of as many side by side")
    for kind in KINDS:
        alone, beside = best["alone"] / best[kind], best["side by side"] / best[kind]
        print(f"{kind:14} {alone:8.2f} {beside:30.2f}" if kind != "alone" else f"{kind:14} {alone:8.2f}")


if __name__ == "__main__":
    main()
