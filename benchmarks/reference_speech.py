"""``Data2VecAudioModel`` of fairseq restated: the forward of a training step, teacher included.

See ``reference_fairseq.py`` for what is compared. Dims: B clips, S samples, T frames, C channels, N masked frames.
"""

import math

import fairseq_eager
import torch
import torch.nn.functional as F
from reference_fairseq import Layer, Teacher, check_config, init_weights
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig
from d2v_fast.nn.config import EncoderConfig, SpeechFrontEndConfig

EVEN = 2  # frames are padded to a multiple of it


class FeatureExtractor(nn.Module):
    """``ConvFeatureExtractionModel`` of the mode "layer_norm": convolutions, float32 layer norm, GELU."""

    def __init__(self, config: SpeechFrontEndConfig) -> None:
        super().__init__()
        self.conv_layers, width = nn.ModuleList(), 1
        self.strides = [stride for *_, stride in config.conv_layers]
        for out, kernel, stride in config.conv_layers:
            conv, norm = nn.Conv1d(width, out, kernel, stride, bias=False), nn.LayerNorm(out)
            nn.init.kaiming_normal_(conv.weight)
            self.conv_layers.append(nn.ModuleDict({"0": conv, "2": nn.ModuleDict({"1": norm})}))
            width = out

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] to [B, T, C], the transposed view of channels first."""
        convs = [layer["0"] for layer in self.conv_layers]
        norms = [layer["2"]["1"] for layer in self.conv_layers]
        return fairseq_eager.conv_encoder(
            waveforms, [c.weight for c in convs], [c.bias for c in convs], [n.weight for n in norms],
            [n.bias for n in norms], strides=self.strides, norm="layer", eps=norms[0].eps,
        )["y"]  # fmt: skip


class Encoder(nn.Module):
    """``wav2vec2.TransformerEncoder``: convolutional positions, layer norm, layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.groups, self.dropout = config.pos_conv_groups, nn.Dropout(config.dropout)
        kernel = max(3, config.pos_conv_width // config.pos_conv_depth)
        convs = [
            nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=self.groups)
            for _ in range(config.pos_conv_depth)
        ]
        self.pos_conv = nn.ModuleList(nn.ModuleList([conv]) for conv in convs)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, T, C] to the same, and every layer's FFN output [T, B, C]."""
        convs = [layer[0] for layer in self.pos_conv]
        positions = fairseq_eager.pos_conv(
            x, [c.weight for c in convs], [c.bias for c in convs], groups=self.groups, norm=True, eps=1e-5
        )["y"]
        x, padding = self.layer_norm(x + positions), None
        frames = x.shape[1]
        missing = -frames % EVEN
        if missing:  # from here on every layer attends with a mask
            x = F.pad(x, (0, 0, 0, missing))
            padding = x.new_zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -missing:] = True
        x, results = self.dropout(x).transpose(0, 1), []
        for layer in self.layers:
            x, result = layer(x, padding)
            results.append(result[:frames])
        return x.transpose(0, 1)[:, :frames], results


class SpeechReference(nn.Module):
    """The whole model; :meth:`loss` is a step's forward, :meth:`follow` the teacher's step."""

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__()
        check_config(config)
        frontend, targets = config.frontend, config.targets
        if (frontend.conv_norm, frontend.conv_bias, targets.norm, targets.post_norm) != (
            "layer",
            False,
            "instance",
            "none",
        ):
            raise ValueError(
                "only the published recipe is restated: layer norm in convolutions, instance norm of targets"
            )
        self.config, dim = config, config.encoder.dim
        self.mask_emb = nn.Parameter(torch.rand(dim))
        self.feature_extractor = FeatureExtractor(frontend)
        width = frontend.conv_layers[-1][0]
        self.layer_norm, self.post_extract_proj = nn.LayerNorm(width), nn.Linear(width, dim)
        self.encoder, self.final_proj = Encoder(config.encoder), nn.Linear(dim, dim)
        self.make_teacher()

    def make_teacher(self) -> None:
        """A new one, equal to the student and in its precision."""
        copied = [name for name, _ in self.encoder.named_parameters() if name.startswith("pos_conv.")]
        self.teacher = Teacher(self.encoder, copied)

    def follow(self, update: int) -> None:
        """The teacher's step behind ``update`` updates."""
        self.teacher.step(self.encoder, self.config.ema.decay_at(update))

    def loss(self, waveforms: Tensor, mask: Tensor) -> Tensor:
        """Waveforms [B, S], mask bool [B, T] on the host, as fairseq draws it: the loss summed over masked frames."""
        x = self.post_extract_proj(self.layer_norm(self.feature_extractor(waveforms)))
        clean = x.clone()  # the mask is written in place
        mask = mask.to(x.device)
        x[mask] = self.mask_emb.to(x.dtype)  # autocast: an embedding of float32 among features of bfloat16
        x, _ = self.encoder(x)
        with torch.no_grad():
            self.teacher.module.eval()
            _, results = self.teacher.module(clean)
        results = [y.transpose(0, 1) for y in results[-self.config.targets.top_k :]]
        pred = self.final_proj(x[mask])
        return fairseq_eager.data2vec_loss(
            pred, results, mask, mask, None, norm="instance", post_norm="none", beta=self.config.loss.beta,
            scale=1 / math.sqrt(pred.shape[1]),
        )["loss"]  # fmt: skip
