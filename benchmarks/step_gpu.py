"""``bench_train_step.py`` on a GPU: milliseconds, samples, share of the matrix product, memory, launches of each side.

"as written" is the peer of ``step_peers.py``, "patched" the same with ``d2v_fast.patch``, "eager" and "torch.compile"
the step of ``step_plain.py``. All run under bfloat16 autocast with float32 parameters. FLOPs are those of the whole
computation, so what a provider leaves out counts for it.
"""

import statistics
import time
from collections.abc import Callable

import step_peers
import step_plain
import torch
from common import DEVICE, interleaved, ratios
from timing import host_us, matmul_tflop_per_s, peak_mib
from torch.profiler import ProfilerActivity, profile

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig
from d2v_fast.train.graph import WARM_UP, CapturedStep
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

SIZES = {"speech": (12, 15 * 16_000), "text": (16, 512), "image": (128, 224)}
GRAPH, OURS, COMPILED = "d2v_fast graph", "d2v_fast", "torch.compile"
PROVIDERS = (GRAPH, OURS, "patched", "as written", "eager", COMPILED)
Step = Callable[[Batch], object]


def provider(name: str, config: Data2VecConfig, optim: OptimConfig, peer_step: Callable) -> Step | None:
    """A step of one provider, on weights of its own; None where it is not installed."""
    torch.manual_seed(0)
    if name in ("eager", COMPILED):
        model = Data2Vec(step_plain.plain_config(config)).to(DEVICE).train()
        return step_plain.plain_step(model, optim, compiled=name == COMPILED)
    model = Data2Vec(config).to(DEVICE).train()
    if name in ("as written", "patched"):
        peer = step_peers.load(model)
        if peer is not None and name == "patched":
            peer.patch()
        return None if peer is None else peer_step(peer)
    optimizer, updates, autocast = build_optimizer(model, optim), iter(range(1_000_000)), DEVICE.type == "cuda"
    if name == OURS:
        return lambda batch: train_step(model, [batch], optimizer, lr=optim.lr, update=next(updates), autocast=autocast)
    captured = CapturedStep(model, optimizer, autocast=autocast, strict=True)
    return lambda batch: captured([batch], lr=optim.lr, update=next(updates))


def step_tflop(config: Data2VecConfig, batch: Batch) -> float:
    """TFLOP of forward and backward of the student (three forwards) and forward of the teacher, nothing left out."""
    encoder, (B, T) = config.encoder, batch.mask.shape
    T += config.modality == "image"
    C, F = encoder.dim, encoder.ffn_dim
    layer = 2 * B * T * (4 * C * C + 2 * C * F) + 4 * B * T * T * C
    total = 4 * encoder.layers * layer
    if config.modality == "speech":  # once, with its gradients
        width, samples = 1, batch.inputs.shape[1]
        for out, kernel, stride in config.frontend.conv_layers:
            samples = (samples - kernel) // stride + 1
            total += 3 * 2 * B * samples * width * out * kernel
            width = out
        depth = encoder.pos_conv_depth
        total += 4 * depth * 2 * B * T * C * C // encoder.pos_conv_groups * max(3, encoder.pos_conv_width // depth)
    return total / 1e12


def units(config: Data2VecConfig, batch: Batch) -> float:
    """Seconds of audio, images or tokens of a batch; ``train/predict.py`` reads how many of them a second takes."""
    if config.modality == "image":
        return batch.inputs.shape[0]
    return batch.inputs.numel() / (config.frontend.sample_rate if config.modality == "speech" else 1)


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that a call puts on the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def measure(
    config: Data2VecConfig, batch: Batch, names: list[str], rounds: int, optim: OptimConfig, peer_step: Callable,
    deadline: float = float("inf"),
) -> list[dict]:  # fmt: skip
    """A row for each provider; those that there is no time or no library for have a ``status`` only."""
    rows, calls = {}, {}
    for name in names:
        if time.monotonic() > deadline:
            rows[name] = {"status": "skipped: out of time"}
            continue
        step = provider(name, config, optim, peer_step)
        if step is None:
            rows[name] = {"status": "not installed"}
            continue
        for _ in range(WARM_UP + 2):
            step(batch)
        calls[name] = lambda step=step: step(batch)
        rows[name] = {"status": "ok", "peak_mib": peak_mib(calls[name])}
    times, peak = interleaved(calls, rounds), matmul_tflop_per_s()
    relative = ratios(times, OURS) if OURS in calls else {}
    for name, call in calls.items():
        seconds = statistics.median(times[name])
        rows[name] |= {
            "ms": 1e3 * seconds,
            "samples_per_s": batch.inputs.shape[0] / seconds,
            "units_per_s": units(config, batch) / seconds,
            "layers": config.encoder.layers,
            "dim": config.encoder.dim,
            "percent_of_matmul": 100 * step_tflop(config, batch) / seconds / peak,
            "host_ms": host_us(call, 5) / 1e3,
            "launches": launches(call),
            **relative.get(name, {}),
        }
    return [{"case": config.modality, "provider": name, **row} for name, row in rows.items()]


def line(row: dict) -> str:
    """A row in words."""
    start = f"{row['case']:7} {row['provider']:15}"
    if row["status"] != "ok":
        return f"{start} {row['status']}"
    ratio = f" time / d2v_fast {row['ratio']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})," if "ratio" in row else ""
    return (
        f"{start}{ratio} {row['ms']:.1f} ms, {row['samples_per_s']:.1f} samples/s, "
        f"{row['percent_of_matmul']:.1f} % of matmul, peak {row['peak_mib']:.0f} MiB, host {row['host_ms']:.2f} ms, "
        f"{row['launches']} launches"
    )
