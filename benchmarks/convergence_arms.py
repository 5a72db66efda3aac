"""The two sides of ``convergence.py``: the trainer's own step, and the same updates in plain PyTorch and float32.

Both start from the same weights and see the same batches, masks, learning rates and decays; LayerDrop skips the same
layers. What dropout draws differs: the kernels draw other numbers than PyTorch's from the same seed.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from common import DEVICE, synchronize
from convergence_data import Prepared
from step_plain import plain_config, plain_ops
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.graph import CapturedStep
from d2v_fast.train.optim import OptimConfig, build_optimizer, learning_rate
from d2v_fast.train.probe import fit_row, pooled, untrained_like
from d2v_fast.train.seeds import layerdrop_seed, seed_micro_batch
from d2v_fast.train.step import train_step

ARMS = ("plain", "fused")
METRICS = ("loss", "grad_norm", "target_var", "pred_var")
DIGITS = 7  # of the metrics that are written down
Step = Callable[[Batch, float, int], tuple[Tensor, ...]]  # batch, learning rate, updates before: METRICS


def reference_config(config: Data2VecConfig) -> Data2VecConfig:
    """The same model with nothing left out and attention as products and a softmax."""
    config = plain_config(config)
    return replace(config, encoder=replace(config.encoder, attention_backend="sdpa_math"))


@contextmanager
def full_precision():
    """float32 products on a GPU without TensorFloat-32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def plain_step(model: Data2Vec, optim: OptimConfig) -> Step:
    """Updates of a model that :func:`reference_config` made, by PyTorch's own operators one after the other."""
    groups = [
        {name: g[name] for name in ("params", "weight_decay")} for g in build_optimizer(model, optim).param_groups
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    students, averages = zip(*model.teacher.averages().items(), strict=True)
    parameters = [p for group in groups for p in group["params"]]

    def step(batch: Batch, lr: float, update: int) -> tuple[Tensor, ...]:
        for group in optimizer.param_groups:
            group["lr"] = lr
        with plain_ops():
            out = model(batch)
        loss = out.loss / batch.num_masked
        loss.backward()
        norm = clip_grad_norm_(parameters, optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = model.config.ema.decay_at(update + 1)
        with torch.no_grad():
            for average, student in zip(averages, students, strict=True):
                average.mul_(decay).add_(student, alpha=1 - decay)
        return loss.detach(), norm, out.target_var, out.pred_var

    return step


def fused_step(model: Data2Vec, optim: OptimConfig, bf16: bool, graph: bool) -> Step:
    """The trainer's step with every fusion there is: one pass for AdamW and the averages, and CUDA graphs if wanted."""
    optimizer = build_optimizer(model, replace(optim, one_pass=True))
    how = {"clip_norm": optim.clip_norm, "autocast": bf16}
    captured = CapturedStep(model, optimizer, strict=True, **how) if graph else None

    def step(batch: Batch, lr: float, update: int) -> tuple[Tensor, ...]:
        if captured is not None:
            out = captured([batch], lr=lr, update=update)
        else:
            out = train_step(model, [batch], optimizer, lr=lr, update=update, **how)
        return tuple(getattr(out, name) for name in METRICS)

    return step


class SeenOps(TorchDispatchMode):
    """The names of our operators, and of all that compute attention, called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("d2v_fast") or "attention" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def is_random(config: Data2VecConfig) -> bool:
    """Whether the model itself draws numbers that differ between the arms; LayerDrop's do not."""
    encoder, frontend = config.encoder, config.frontend
    rates = [encoder.dropout, encoder.attention_dropout, encoder.activation_dropout, encoder.drop_path]
    return any([*rates, getattr(frontend, "dropout", 0.0), getattr(frontend, "input_dropout", 0.0)])


def run(
    prepared: Prepared, arm: str, seed: int, updates: int, *, precision: str = "auto", graph: str = "auto"
) -> dict[str, Any]:
    """Pretrain and probe; what ``convergence.py report`` reads.

    Args:
        prepared: batches and settings.
        arm: "plain" or "fused".
        seed: of weights, batches, masks and dropout.
        updates: of the whole run, schedules included.
        precision: of the fused arm, "bf16" (autocast) or "fp32"; auto: bf16 on a GPU.
        graph: "on" or "off", CUDA graphs in the fused arm; auto: on a GPU, unless the model has LayerDrop, which a
            graph draws on the device and the other arm on the host.

    Raises:
        ValueError: ``arm`` is neither, or :meth:`Prepared.batches` refuses.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    gpu, fused = DEVICE.type == "cuda", arm == "fused"
    config = prepared.model if fused else reference_config(prepared.model)
    bf16 = fused and (precision == "bf16" or (precision == "auto" and gpu))
    graphs = fused and (graph == "on" or (graph == "auto" and gpu and config.encoder.layerdrop == 0))
    start = time.perf_counter()
    batches = prepared.batches(seed, updates)
    torch.manual_seed(seed)
    model = Data2Vec(config).to(DEVICE).train()
    step = fused_step(model, prepared.optim, bf16, graphs) if fused else plain_step(model, prepared.optim)
    with full_precision():
        rows, ops = _train(prepared, model, step, batches, seed, updates, static=graphs)
        synchronize()
        seconds = time.perf_counter() - start
        probes = _probe(prepared, model, seed)
    rows = [
        [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in column] for column in zip(*rows, strict=True)
    ]
    return {
        "modality": prepared.modality,
        "seed": seed,
        "arm": arm,
        "updates": updates,
        "data": prepared.digest,
        "precision": "bf16" if bf16 else "fp32",
        "cuda_graph": graphs,
        "exact": not bf16 and not is_random(config),  # the other arm's losses should then be the same up to rounding
        "ops": ops,
        "seconds": seconds,
        "curves": dict(zip(METRICS, rows, strict=True)),
        "probe": probes,
    }


def _train(
    prepared: Prepared, model: Data2Vec, step: Step, batches: Any, seed: int, updates: int, static: bool
) -> tuple[list[list[float]], list[str]]:
    """Metrics of each update, which stay on the device till the end; the names of ops of the first one."""
    found, seen, static_rows = [], SeenOps(), None
    for update, (inputs, mask) in enumerate(batches):
        if static:  # one shape for all masks
            static_rows = mask.shape[0] * model.config.mask.most(mask.shape[1])
        batch = make_batch(inputs, mask, num_masked=static_rows).to(DEVICE)
        lr = learning_rate(update, updates, prepared.optim, prepared.schedule)
        model.encoder.layerdrop_seed = layerdrop_seed(seed, update)
        seed_micro_batch(seed, update, 0)
        if update == 0:
            with seen:
                metrics = step(batch, lr, update)
        else:
            metrics = step(batch, lr, update)
        found.append(torch.stack([x.float() for x in metrics]))
    return torch.stack(found).tolist(), sorted(seen.names)


def _probe(prepared: Prepared, model: Data2Vec, seed: int) -> list[dict[str, Any]]:
    """Rows "pretrained" and "untrained", read by the same plain modules for both arms; none if weights are not finite.

    The features are the mean over positions and layers, as the trainer's probe takes them.
    """
    reference = Data2Vec(reference_config(prepared.model)).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    if not all(bool(p.isfinite().all()) for p in reference.parameters()):
        return []
    rows = []
    for name, one in (("pretrained", reference), ("untrained", untrained_like(reference, seed))):
        data = []
        for part in ("train", "test"):
            with plain_ops():
                found = [(pooled(one, x, padding), labels) for x, padding, labels in prepared.examples(part)]
            data += [np.concatenate(column) for column in zip(*found, strict=True)]
        rows.append(asdict(fit_row(name, *data)))
    return rows
