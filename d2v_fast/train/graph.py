"""One update as the replay of a CUDA graph: forward, backward, optimizer and teacher in one launch."""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.nn.sequences import Sequences
from d2v_fast.optim import AdamWEMA
from d2v_fast.train.step import StepMetrics, apply, backward, forward, train_step

logger = logging.getLogger(__name__)

WARM_UP = 2  # updates of a shape before it is captured: kernels are compiled, optimizer state and caches allocated
Replay = Callable[[], object]


class CapturedStep:
    """:func:`d2v_fast.train.step.train_step` with a CUDA graph for each shape of batches.

    The first updates of a shape run eagerly, as updates like any other, on a side stream; the next one is captured, and
    from then on replayed: the batch is copied into the graph's own, learning rate, decay and weight of the loss are
    written to device memory, and the metrics read out. So the batches of a run should have few shapes
    (``make_batch(num_masked=, num_valid=)``). Dropout draws from PyTorch's generator at every replay, from wherever
    ``torch.manual_seed`` has put it; LayerDrop is drawn on the device.

    What is known not to be capturable falls back to ``train_step``: the reason is logged once, and ``fallbacks``
    counts. A capture that fails on the way is an error, as nothing can go on from there.

    Graphs hold the addresses of parameters, optimizer state and the teacher's low-precision copies, the optimizer's
    settings, the model's mode, and what is frozen. They are dropped when one of these has changed.

    Args:
        model, optimizer, clip_norm, autocast: as for ``train_step``. The optimizer is ``AdamW(fused=True)`` or
            ``AdamWEMA``.
        strict: raise instead of falling back.
        max_graphs: shapes that are captured. All share one pool of memory, as large as the largest needs.
        record: stands in for :meth:`capture` (tests): a function without arguments to one that runs it again, and its
            result, a tensor that every run overwrites.
    """

    def __init__(
        self,
        model: Data2Vec,
        optimizer: torch.optim.AdamW | AdamWEMA,
        *,
        clip_norm: float = 0.0,
        autocast: bool = False,
        strict: bool = False,
        max_graphs: int = 16,
        record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] | None = None,
    ) -> None:
        self.model, self.optimizer, self.strict, self.max_graphs = model, optimizer, strict, max_graphs
        self.clip_norm, self.autocast, self._record = clip_norm, autocast, record
        self.replays = self.fallbacks = 0
        self._reasons: set[str] = set()
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: dict[tuple, int] = {}  # updates of a shape before it was captured
        self._parameters = list(model.parameters())  # the teacher's too
        self._fixed: tuple = ()  # what the graphs take for given
        self._pool = self._stream = None

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        update: int,
        prepare: Callable[[int, Batch], Batch] | None = None,
    ) -> StepMetrics:
        """Make update ``update + 1``; arguments as of :func:`d2v_fast.train.step.train_step`.

        Raises:
            RuntimeError: ``strict``, and this update cannot be captured; or something in it waited for the device while
                it was captured, whatever ``strict`` says: neither the stream nor the random generator is usable then.
        """
        if prepare is not None and len(batches) == 1:
            batches, prepare = [prepare(0, batches[0])], None
        self._forget_changed()
        shape = None if len(batches) != 1 else signature(batches[0])
        if shape in self._graphs:
            return self._replay(self._graphs[shape], batches[0], lr, update)
        reason = self._why_not(batches)
        if reason is not None:
            return self._fall_back(reason, batches, lr, update, prepare)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] <= WARM_UP:
            return self._on_side_stream(batches, lr, update)
        self._graphs[shape] = self._capture(batches[0], update)
        return self._replay(self._graphs[shape], batches[0], lr, update)

    def _why_not(self, batches: Sequence[Batch]) -> str | None:
        """What keeps this update from being captured."""
        device = batches[0].inputs.device
        if self._record is None and device.type != "cuda":
            return f"the model is on {device.type}: CUDA graphs need a CUDA device"
        if len(batches) != 1:
            return f"an update of {len(batches)} micro-batches is not captured, only one of a single batch"
        if len(self._graphs) >= self.max_graphs:
            return f"more than max_graphs = {self.max_graphs} shapes of batches"
        return None

    def _fall_back(
        self,
        reason: str,
        batches: Sequence[Batch],
        lr: float,
        update: int,
        prepare: Callable[[int, Batch], Batch] | None,
    ) -> StepMetrics:
        if self.strict:
            raise RuntimeError(f"the training step cannot run as a CUDA graph: {reason}")
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.warning("no CUDA graph for this update: %s", reason)
        self.fallbacks += 1
        return self._eager(batches, lr, update, prepare=prepare)

    def _eager(self, batches: Sequence[Batch], lr: float, update: int, **how) -> StepMetrics:
        how |= {"clip_norm": self.clip_norm, "autocast": self.autocast}
        return train_step(self.model, batches, self.optimizer, lr=lr, update=update, **how)

    def _on_side_stream(self, batches: Sequence[Batch], lr: float, update: int) -> StepMetrics:
        """An eager update where capture will happen, so that whatever belongs to a stream is there by then."""
        if self._record is not None:
            return self._eager(batches, lr, update)
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            metrics = self._eager(batches, lr, update)
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics

    def _capture(self, batch: Batch, update: int) -> "_Graph":
        graph = _Graph(batch)

        def body() -> Tensor:  # [6], the metrics
            with static_settings(self.optimizer, graph.lr):
                output = backward(forward(self.model, graph.batch, self.autocast), graph.weight, 1.0)
                grad_norm, skipped = apply(self.model, self.optimizer, update + 1, self.clip_norm, graph.decay)
            return torch.cat([output, torch.stack([grad_norm, skipped]).to(output.dtype)])

        try:
            graph.replay, graph.metrics = (self._record or self.capture)(body)
        except RuntimeError as error:
            raise RuntimeError(f"the training step could not be captured, set cuda_graph to off: {error}") from error
        return graph

    def capture(self, body: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record what ``body`` launches, without running it: how to run it, and its result."""
        graph = torch.cuda.CUDAGraph()
        # other threads, such as the one that pins batches, may go on with what is not allowed while capturing
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            metrics = body()
        return graph.replay, metrics

    def _replay(self, graph: "_Graph", batch: Batch, lr: float, update: int) -> StepMetrics:
        decay = self.model.config.ema.decay_at(update + 1)
        total = max(1, batch.num_masked)
        torch._foreach_copy_(tensors_of(graph.batch), tensors_of(batch), non_blocking=True)
        for x, value in ((graph.lr, lr), (graph.decay, decay), (graph.weight, 1 / total)):
            x.fill_(value)
        graph.replay()
        for group in self.optimizer.param_groups:  # as after an eager update, for whoever saves the optimizer
            group["lr"] = lr
        self.model.teacher.note_update(update + 1)
        self.replays += 1
        return StepMetrics(*graph.metrics.clone().unbind(), decay, total)

    def _forget_changed(self) -> None:
        """Drop the graphs when something that they take for given has changed."""
        device = self._parameters[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            network = self.model.teacher.network(device)  # up to date if an average was written by other means
        fixed: list = [self.model.training, network]
        for p in self._parameters:
            fixed += (p.data_ptr(), p.requires_grad)
        for state in self.optimizer.state.values():
            fixed += [x.data_ptr() for x in state.values()]
        for group in self.optimizer.param_groups:
            fixed += [group[name] for name in ("betas", "eps", "weight_decay")]
        if self._graphs and tuple(fixed) != self._fixed:
            logger.info("parameters, optimizer state or settings have changed: CUDA graphs are captured again")
            self._graphs.clear()
        self._fixed = tuple(fixed)


class _Graph:
    """What a graph reads and writes, at addresses that stay: a batch, three numbers, metrics."""

    def __init__(self, batch: Batch) -> None:
        device = batch.inputs.device
        self.batch = batch.map(torch.clone)
        self.lr = torch.zeros((), dtype=torch.float32, device=device)  # the fused AdamW takes no other dtype
        self.decay = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float32, device=device)
        self.replay: Replay
        self.metrics: Tensor  # [6]


@contextmanager
def static_settings(optimizer: torch.optim.Optimizer, lr: Tensor):
    """The optimizer reads its learning rate from a tensor, and may be captured; afterwards it is as before."""
    before = [(group, group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = lr, True
    try:
        yield
    finally:
        for group, rate, capturable in before:
            group["lr"], group["capturable"] = rate, capturable


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, those of its sequences included, in a fixed order."""
    found: list[Tensor] = []
    batch.map(lambda x: found.append(x) or x)
    return found


def signature(batch: Batch) -> tuple:
    """What batches for one graph have in common: shapes, dtypes, and what the host knows of sequences."""
    parts = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            parts.append((field.name, value.shape, value.dtype))
        elif isinstance(value, Sequences):
            sizes = [None if x is None else (x.shape, x.dtype) for x in (value.cu_seqlens, value.rows, value.real)]
            parts.append((field.name, value.max_length, value.num_rows, *sizes))
    return tuple(parts)
