"""data2vec 1.0: a student that predicts, at masked positions, what its moving-average teacher sees there.

Dims: B batch, T positions, P encoder positions (T, plus the class token of images), C channels, M masked positions,
N packed rows.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.batch import Batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.frontends import build_frontend
from d2v_fast.nn.heads import build_head
from d2v_fast.nn.interchange import Interchange
from d2v_fast.nn.rows import Rows, student_rows, teacher_rows, uses_time
from d2v_fast.nn.sequences import Sequences
from d2v_fast.nn.teacher import EMATeacher
from d2v_fast.ops import LossOutput, data2vec_loss

SPREAD_ROWS = 2048  # at most, of which feature_spread is taken


@torch.no_grad()
def feature_spread(x: Tensor, positions: Tensor) -> Tensor:
    """How much features x [..., C] at ``positions`` [M], negative ones ignored, differ from each other: [] fp32.

    As of targets and predictions the mean over channels of the standard deviation, but of positions normalised over
    their channels first, as features have any scale: at most 1, and 0 if all are the same. So it shows convolutions
    that collapse while loss and targets look well (facebookresearch/fairseq#5239).
    """
    sample = positions[:: max(1, -(-positions.shape[0] // SPREAD_ROWS))]
    counts = (sample >= 0).float()[:, None]
    weight = counts / counts.sum().clamp(min=1)
    rows = x.flatten(0, -2).index_select(0, sample.clamp(min=0)).float()
    rows = F.layer_norm(rows, rows.shape[-1:])
    mean = (weight * rows).sum(0)  # no matrix product: autocast would take it in bfloat16
    return (weight * (rows - mean).square()).sum(0).sqrt().mean()


class Data2Vec(Interchange, nn.Module):
    """The whole model. ``forward`` is a training step's forward; ``encode`` gives features for other uses."""

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = build_frontend(config)
        self.encoder = TransformerEncoder(config.encoder, getattr(config.frontend, "grid", 0))
        self.head = build_head(config)
        tracked = {"encoder": self.encoder}
        if config.modality != "speech":  # speech: the teacher reads the student's own features
            tracked["frontend"] = self.frontend
        copies = torch.bfloat16 if config.prune.teacher_copy else None
        self.teacher = EMATeacher(nn.ModuleDict(tracked), config.ema, config.ema.skip, copies=copies)

    def forward(self, batch: Batch) -> LossOutput:
        """Loss of the student on ``batch`` against the current teacher.

        What no result depends on is left out as ``config.prune`` says, if ``batch`` has the sequences for it
        (:func:`d2v_fast.nn.make_batch` makes them).

        Raises:
            TypeError: inputs, masks or positions of another dtype than :class:`Batch` says.
            ValueError: masks that do not fit the inputs (they count frames, patches or tokens), sequences of another
                number of rows than positions, or what :meth:`Batch.check` finds; that is only asked on the CPU,
                elsewhere it would wait for the device.
        """
        self._check_batch(batch)
        student, teacher = student_rows(self.config, batch), teacher_rows(self.config, batch)
        student_input, teacher_input = self._inputs(batch, student, teacher)  # [B, P, C], or packed [N, C]
        results, positions = self._layer_results(teacher_input, teacher, batch)
        x = self.encoder(
            student_input, sequences=student.packed, padding_mask=student.padding_mask, select=student.select
        ).x
        pred = self.head(student.at_masked(x))  # [M, C]
        targets, loss = self.config.targets, self.config.loss
        total, target_var, pred_var, *_ = data2vec_loss(
            pred,
            results,
            positions,
            norm=targets.norm,
            post_norm=targets.post_norm,
            beta=loss.beta,
            scale=loss.scale_for(pred.shape[1]),
            lengths=batch.lengths if targets.padding_aware and uses_time(targets) else None,
        )
        features = feature_spread(teacher_input, teacher.positions).to(total.dtype)
        # num_masked is without what fills up a fixed number; Dynamo of PyTorch 2.11 cannot trace _replace
        return LossOutput(total, target_var, pred_var, batch.num_masked, features)

    def _inputs(self, batch: Batch, student: Rows, teacher: Rows) -> tuple[Tensor, Tensor]:
        """What the encoders of student and teacher read; the teacher's has no gradient."""
        inputs, mask = batch.inputs, batch.mask
        if self.config.modality == "speech":
            features = self.frontend.features(inputs)  # [B, T, C]
            clean = student.take(features)
            x = self.frontend.apply_mask(clean, student.take(mask))
            return x, (clean if teacher.packed is student.packed else teacher.take(features)).detach()
        shared = self.config.prune.share_features and self.teacher.shares("frontend")
        if self.config.modality == "image":
            if shared:
                return self.frontend.masked_and_clean(inputs, mask)
            return self.frontend(inputs, mask), self._teacher_frontend(inputs)
        same = student.packed is teacher.packed and student.padding_mask is teacher.padding_mask
        tokens, how = student.take(inputs), {"padding_mask": student.padding_mask, "sequences": student.packed}
        if shared and same and student.masked is not None:
            return self.frontend.masked_and_clean(tokens, student.masked, **how)
        x = self.frontend(tokens, student.take(mask), **how)
        return x, self._teacher_frontend(
            teacher.take(inputs), padding_mask=teacher.padding_mask, sequences=teacher.packed
        )

    def _teacher_precision(self, device_type: str) -> AbstractContextManager:
        """The averages are float32 also in a bfloat16 or float16 model, whose precision their matrices then run in."""
        dtype = self.head[0].weight.dtype
        if dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device_type):
            return nullcontext()
        return torch.autocast(device_type, dtype)

    @torch.no_grad()
    def _teacher_frontend(self, inputs: Tensor, **how: Tensor | Sequences | None) -> Tensor:
        with self._teacher_precision(inputs.device.type):
            return self.teacher.network(inputs.device.type)["frontend"](inputs, None, **how)

    @torch.no_grad()
    def _layer_results(self, x: Tensor, rows: Rows, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The teacher's last ``top_k`` layer results [B, T, C], and where in them each prediction has its target.

        Without statistics over time it does not matter which row of the batch a position is in: they are [1, R, C] of
        all rows R then. The last result, if it was computed at M of these rows only, is put where it belongs in memory
        that is not even set: the others, K - 1 of them, would have to be gathered, and nothing reads other rows.
        """
        with self._teacher_precision(x.device.type):
            results = self.teacher.network(x.device.type)["encoder"](
                x,
                sequences=rows.packed,
                padding_mask=rows.padding_mask,
                top_k=self.config.targets.top_k,
                select=rows.select,
                results_only=self.config.prune.teacher_stop,
            ).layer_results
        if uses_time(self.config.targets):
            first = 1 if self.config.modality == "image" else 0  # without the class token
            return [rows.batched(result, batch.mask.shape)[:, first:] for result in results], batch.positions
        if rows.pruned:
            last = results[-1]
            whole = last.new_empty(x.shape[:-1].numel(), last.shape[1])
            results[-1] = whole.index_copy_(0, rows.masked.rows, last)
        return [result.reshape(1, -1, result.shape[-1]) for result in results], rows.positions

    def _check_device(self, name: str, x: Tensor | None) -> None:
        device = self.head[0].weight.device
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device}, where the model is, got {x.device}")

    def _check_batch(self, batch: Batch) -> None:
        for name in ("inputs", "mask", "positions", "padding_mask", "lengths"):
            self._check_device(f"batch.{name}", getattr(batch, name))
        for name in ("masked", "masked_alone", "valid", "masked_in_valid"):
            sequences = getattr(batch, name)
            self._check_device(f"batch.{name}", None if sequences is None else sequences.rows)
        self._check_mask("batch.mask", batch.mask, batch.inputs)
        self._check_padding("batch.padding_mask", batch.padding_mask, batch.inputs)
        positions = batch.positions
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"batch.positions must be int32 or int64, got {positions.dtype}")
        if positions.ndim != 1:
            raise ValueError(f"batch.positions must be [M], got {tuple(positions.shape)}")
        if batch.masked is not None and batch.masked.num_rows != positions.numel():
            rows = batch.masked.num_rows
            raise ValueError(f"batch.masked must have the {positions.numel()} rows of positions, got {rows}")
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            batch.check()

    def _check_padding(self, name: str, padding_mask: Tensor | None, inputs: Tensor) -> None:
        if padding_mask is None:
            return
        if self.config.modality == "image":
            raise ValueError(f"{name} must be None: images have no padding")
        self._check_mask(name, padding_mask, inputs)

    def _check_mask(self, name: str, mask: Tensor, inputs: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {mask.dtype}")
        expected = (inputs.shape[0], self.frontend.num_positions(inputs))
        if tuple(mask.shape) != expected:
            unit = {"speech": "frames, not samples", "image": "patches", "text": "tokens"}[self.config.modality]
            raise ValueError(f"{name} must be {expected} for these inputs, got {tuple(mask.shape)}; it counts {unit}")

    def _embed(self, inputs: Tensor, padding_mask: Tensor | None) -> Tensor:
        self._check_device("inputs", inputs)
        self._check_device("padding_mask", padding_mask)
        self._check_padding("padding_mask", padding_mask, inputs)
        return self.frontend(inputs, None, padding_mask)

    def hidden_states(self, inputs: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """Input of the student's first layer and output of each layer, [B, P, C]; nothing masked.

        ``padding_mask`` bool [B, T], True = padding, counts frames or tokens. Images have the class token first.

        Raises:
            TypeError: ``inputs`` or ``padding_mask`` of a wrong dtype.
            ValueError: ``inputs`` or ``padding_mask`` of a wrong shape or on another device, or a ``padding_mask`` with
                images.
        """
        x = self._embed(inputs, padding_mask)
        return self.encoder(x, padding_mask=padding_mask, hidden_states=True).hidden_states

    def encode(self, inputs: Tensor, padding_mask: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Features [B, P, C] of unmasked inputs: the encoder's output, or that of ``layer`` (0 = first layer's input).

        Dropout follows ``self.training``: call ``eval()`` first for features to keep.

        Raises:
            TypeError: as :meth:`hidden_states`.
            ValueError: as :meth:`hidden_states`, or ``layer`` is not one of 0 .. number of layers.
        """
        if layer is None:
            return self.encoder(self._embed(inputs, padding_mask), padding_mask=padding_mask).x
        if not 0 <= layer <= self.config.encoder.layers:
            raise ValueError(f"layer must be in 0..{self.config.encoder.layers}, got {layer}")
        return self.hidden_states(inputs, padding_mask)[layer]
