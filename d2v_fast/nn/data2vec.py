"""data2vec 1.0: a student that predicts, at masked positions, what its moving-average teacher sees there.

Dims: B batch, T positions, P encoder positions (T, plus the class token of images), C channels, N masked positions.
"""

import torch
from torch import Tensor, nn

from d2v_fast.nn.batch import Batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.frontends import build_frontend
from d2v_fast.nn.heads import build_head
from d2v_fast.nn.teacher import EMATeacher
from d2v_fast.ops import LossOutput, data2vec_loss


class Data2Vec(nn.Module):
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
        self.teacher = EMATeacher(nn.ModuleDict(tracked), config.ema, config.ema.skip)

    @property
    def _class_tokens(self) -> int:
        return 1 if self.config.modality == "image" else 0

    def forward(self, batch: Batch) -> LossOutput:
        """Loss of the student on ``batch`` against the current teacher.

        Raises:
            TypeError: inputs, masks or positions of another dtype than :class:`Batch` says.
            ValueError: masks that do not fit the inputs (they count frames, patches or tokens), or positions that are
                not as many as the mask's; the latter is only looked at on the CPU, elsewhere it would wait for the
                device.
        """
        self._check_batch(batch)
        if self.config.modality == "speech":
            features = self.frontend.features(batch.inputs)  # [B, T, C]
            teacher_input, teacher_padding = features.detach(), batch.padding_mask
            student_input = self.frontend.apply_mask(features, batch.mask)
        else:
            student_input = self.frontend(batch.inputs, batch.mask, batch.padding_mask)  # [B, P, C]
            teacher_input, teacher_padding = self._teacher_input(batch)

        results = self._layer_results(teacher_input, teacher_padding)
        x = self.encoder(student_input, padding_mask=batch.padding_mask).x  # [B, P, C]
        pred = self.head(x.flatten(0, 1).index_select(0, self._rows(batch)))  # [N, C]
        targets, loss = self.config.targets, self.config.loss
        return data2vec_loss(
            pred,
            results,
            batch.positions,
            norm=targets.norm,
            post_norm=targets.post_norm,
            beta=loss.beta,
            scale=loss.scale_for(pred.shape[1]),
            lengths=batch.lengths if targets.padding_aware else None,
        )

    def _rows(self, batch: Batch) -> Tensor:
        """Masked positions [N] as rows of the encoder's flattened output, which may hold class tokens."""
        if not self._class_tokens:
            return batch.positions
        return batch.positions + batch.positions // batch.mask.shape[1] + 1

    @torch.no_grad()
    def _teacher_input(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the teacher's encoder reads, with its padding mask, when the teacher has a front-end of its own."""
        inputs, padding = batch.inputs, batch.padding_mask
        if self.config.targets.teacher_input == "masked":  # the released text code shows it the masked tokens only
            inputs, padding = inputs.masked_fill(~batch.mask, self.config.frontend.pad_index), ~batch.mask
        return self.teacher.module["frontend"](inputs, None, padding), padding

    @torch.no_grad()
    def _layer_results(self, x: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        """The teacher's last ``top_k`` layer results [B, T, C], without the class token."""
        results = self.teacher.module["encoder"](x, padding_mask=padding_mask, top_k=self.config.targets.top_k)
        return [result[:, self._class_tokens :] for result in results.layer_results]

    def _check_device(self, name: str, x: Tensor | None) -> None:
        device = self.head[0].weight.device
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device}, where the model is, got {x.device}")

    def _check_batch(self, batch: Batch) -> None:
        for name in ("inputs", "mask", "positions", "padding_mask", "lengths"):
            self._check_device(f"batch.{name}", getattr(batch, name))
        self._check_mask("batch.mask", batch.mask, batch.inputs)
        self._check_padding("batch.padding_mask", batch.padding_mask, batch.inputs)
        positions = batch.positions
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"batch.positions must be int32 or int64, got {positions.dtype}")
        if positions.ndim != 1:
            raise ValueError(f"batch.positions must be [N], got {tuple(positions.shape)}")
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(batch.mask.sum())
            if positions.numel() != count:
                raise ValueError(f"batch.positions must be the {count} masked positions, got {positions.numel()}")

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
