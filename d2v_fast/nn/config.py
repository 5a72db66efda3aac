"""What a data2vec model is made of, and the paper's recipes as presets.

The presets' values are those of the published recipes (Baevski et al. 2022 and the configurations released with it).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

from d2v_fast.nn.masking import BlockMask, SpanMask, TokenSpanMask

Profile = Literal["paper", "fairseq"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choices(config: object, group: str = "") -> None:
    """Refuse values of ``Literal`` fields, and strings in fields that may also be a number, that are not a choice."""
    for name, hint in get_type_hints(type(config)).items():
        parts = (hint, *get_args(hint))  # the field's type, and if that is a union its members
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        value = getattr(config, name)
        if choices and value not in choices and (get_origin(hint) is Literal or isinstance(value, str)):
            raise ValueError(f"{group}{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SpeechFrontEndConfig:
    """Convolutions over the waveform (fairseq ``ConvFeatureExtractionModel``), layer norm, linear projection."""

    conv_layers: tuple[tuple[int, int, int], ...] = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
    conv_norm: Literal["layer", "group"] = "layer"  # fairseq extractor_mode layer_norm / default
    conv_bias: bool = False
    feature_grad_mult: float = 1.0  # scales the gradient into the convolutions; 0 freezes them
    input_dropout: float = 0.0
    sample_rate: int = 16_000  # Hz

    def __post_init__(self) -> None:
        _check_choices(self, "frontend.")
        _require(
            len(self.conv_layers) > 0 and all(min(layer) > 0 for layer in self.conv_layers),
            f"frontend.conv_layers must be (channels, kernel, stride) triples of positive ints, got {self.conv_layers}",
        )

    def num_frames(self, num_samples: int | np.ndarray) -> int | np.ndarray:
        """Frames [..] that ``num_samples`` [..] give: ``floor((n - kernel) / stride) + 1`` per layer, at least 0."""
        for _, kernel, stride in self.conv_layers:
            num_samples = (num_samples - kernel) // stride + 1
        return np.maximum(num_samples, 0) if isinstance(num_samples, np.ndarray) else max(num_samples, 0)

    @property
    def min_samples(self) -> int:
        """Receptive field: the shortest waveform, in samples, that gives a frame (400 for the published stack)."""
        samples = 1
        for _, kernel, stride in reversed(self.conv_layers):
            samples = (samples - 1) * stride + kernel
        return samples

    @property
    def total_stride(self) -> int:
        """Samples from one frame to the next (320 for the published stack)."""
        return math.prod([stride for _, _, stride in self.conv_layers])  # a list: torch.compile reads no generator


@dataclass(frozen=True, kw_only=True)
class ImageFrontEndConfig:
    """Square patches, each through one linear map, and a class token in front."""

    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    channels: int = 3

    def __post_init__(self) -> None:
        _require(
            self.patch_size > 0 and self.image_size % self.patch_size == 0 and self.image_size > 0,
            f"frontend.image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class TextFrontEndConfig:
    """Token and learned position embeddings, layer norm, dropout (RoBERTa). ``<mask>`` is the last token id."""

    vocab_size: int = 50_265  # with the special tokens
    max_positions: int = 512
    dropout: float = 0.1
    position_init_std: float = 0.02  # below it, short runs depend less on where a token stands

    bos_index = 0
    pad_index = 1
    eos_index = 2
    unk_index = 3

    def __post_init__(self) -> None:
        _require(self.vocab_size > 5, f"frontend.vocab_size must be above 5, got {self.vocab_size}")
        _require(self.max_positions > 0, f"frontend.max_positions must be positive, got {self.max_positions}")
        std = self.position_init_std
        _require(std > 0, f"frontend.position_init_std must be positive, got {std}")

    @property
    def mask_index(self) -> int:
        """Id of ``<mask>``."""
        return self.vocab_size - 1


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The Transformer that student and teacher share."""

    layers: int = 12
    dim: int = 768
    ffn_dim: int = 3072
    heads: int = 12
    norm: Literal["post", "pre"] = "post"
    norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layerdrop: float = 0.0  # probability of skipping a student layer
    drop_path: float = 0.0  # of the last layer; grows linearly from 0
    layer_scale: float = 0.0  # initial value; 0 = none
    key_bias: bool = True
    layer_result: Literal["ffn", "block"] = "ffn"  # what targets are made of: FFN output or block output
    pos_conv_depth: int = 0  # convolutional positions (speech); 0 = none, 1 = wav2vec 2.0's, with weight norm
    pos_conv_width: int = 95  # fairseq conv_pos: kernel max(3, width // depth) of each layer; at depth 1, width
    pos_conv_groups: int = 16
    relative_bias: bool = False  # learned bias per head and patch offset, shared by all layers (images)
    padding_aware: bool = True  # a padded row as if it were alone; False: convolutional positions see its padding
    init: Literal["bert", "beit"] = "bert"
    init_std: float = 0.02  # of linear layers; the published value suits 768 and more channels
    # how it is computed, not what
    checkpointing: Literal["none", "selective", "full"] = "none"  # activations to compute again in backward
    attention_backend: str = "auto"  # a name of the table in nn/attention_backends.py
    attention_strict: bool = False  # an error instead of a slower backend than the case allows for

    def __post_init__(self) -> None:
        _check_choices(self, "encoder.")
        for name in ("layers", "dim", "ffn_dim", "heads", "init_std"):
            _require(getattr(self, name) > 0, f"encoder.{name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "drop_path"):
            _require(0 <= getattr(self, name) < 1, f"encoder.{name} must be in [0, 1), got {getattr(self, name)}")
        _require(0 < self.norm_eps < math.inf, f"encoder.norm_eps must be positive, got {self.norm_eps}")
        _require(self.layer_scale >= 0, f"encoder.layer_scale must be >= 0, got {self.layer_scale}")
        _require(self.dim % self.heads == 0, f"encoder.dim {self.dim} must be a multiple of heads {self.heads}")
        _require(
            self.pos_conv_depth >= 0 and self.pos_conv_width >= 1,
            "encoder.pos_conv_depth must be >= 0 and pos_conv_width >= 1, "
            f"got {self.pos_conv_depth} and {self.pos_conv_width}",
        )
        _require(
            self.pos_conv_depth == 0 or (self.pos_conv_groups > 0 and self.dim % self.pos_conv_groups == 0),
            f"encoder.dim {self.dim} must be a multiple of pos_conv_groups {self.pos_conv_groups}",
        )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How the teacher's layer results become the regression target (paper section 3.3)."""

    top_k: int = 8
    norm: Literal["instance", "layer", "batch", "none"] = "instance"
    post_norm: Literal["none", "layer", "instance"] = "none"
    padding_aware: bool = True  # statistics over valid frames only; fairseq: over padding too
    teacher_input: Literal["full", "masked"] = "full"  # text; "masked": only the masked tokens, as fairseq feeds it

    def __post_init__(self) -> None:
        _check_choices(self, "targets.")
        _require(self.top_k > 0, f"targets.top_k must be positive, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Smooth L1 (squared error for ``beta = 0``), summed over channels, times ``scale``, averaged over positions."""

    beta: float = 0.0
    scale: float | Literal["rsqrt_dim", "mean"] = "rsqrt_dim"  # 1 / sqrt(C), or 1 / C, or a number
    token_weighted: bool = True  # False: mean of the micro-batches' and ranks' means (BEiT-style vision)

    def __post_init__(self) -> None:
        _check_choices(self, "loss.")
        _require(self.beta >= 0, f"loss.beta must be >= 0, got {self.beta}")

    def scale_for(self, dim: int) -> float:
        """The factor on a position's sum over ``dim`` channels."""
        return {"rsqrt_dim": dim**-0.5, "mean": 1 / dim}[self.scale] if isinstance(self.scale, str) else self.scale


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The teacher's decay: linear from ``decay`` to ``end_decay`` over ``anneal_updates``, then constant."""

    decay: float = 0.999
    end_decay: float = 0.9999
    anneal_updates: int = 30_000
    skip: tuple[str, ...] = ()  # parameters or modules that are copied instead of averaged
    per: Literal["update", "micro_batch"] = "update"  # fairseq data2vec 1.0 steps the teacher once per micro-batch

    def __post_init__(self) -> None:
        _check_choices(self, "ema.")
        _require(
            0 <= self.decay <= 1 and 0 <= self.end_decay <= 1,
            f"ema.decay and end_decay must be in [0, 1], got {self.decay} and {self.end_decay}",
        )
        _require(self.anneal_updates >= 0, f"ema.anneal_updates must be >= 0, got {self.anneal_updates}")

    def decay_at(self, update: int) -> float:
        """Decay of the teacher step after ``update`` completed optimizer updates (fairseq ``get_annealed_rate``)."""
        if update >= self.anneal_updates:
            return self.end_decay
        return self.end_decay - (self.end_decay - self.decay) * (1 - update / self.anneal_updates)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What a training step leaves out because no result depends on it. Each changes rounding at most."""

    student_rows: bool = True  # the last student layer: queries, out-projection and FFN at masked rows only
    teacher_stop: bool = True  # the last teacher layer ends with its result: no final residual and norm
    teacher_rows: bool = True  # the last teacher layer at masked rows only, if targets need no statistics over time
    teacher_copy: bool = True  # under autocast the teacher's matrices are copies that the update writes, not casts
    share_features: bool = True  # features once for student and teacher, where both have the same front-end
    unpad: bool = True  # padding is not computed


_KINDS = {  # front-end and mask of each modality
    "speech": (SpeechFrontEndConfig, SpanMask),
    "image": (ImageFrontEndConfig, BlockMask),
    "text": (TextFrontEndConfig, TokenSpanMask),
}
_ENCODER_SIZES = {
    "base": {"layers": 12, "dim": 768, "ffn_dim": 3072, "heads": 12},
    "large": {"layers": 24, "dim": 1024, "ffn_dim": 4096, "heads": 16},
}


def _sized(modality: str, size: str, allowed: tuple[str, ...]) -> dict[str, int]:
    _require(size in allowed, f"{modality} size must be one of {', '.join(allowed)}, got {size!r}")
    return _ENCODER_SIZES[size]


@dataclass(frozen=True, kw_only=True)
class Data2VecConfig:
    """A whole data2vec 1.0 model; build one with :meth:`speech`, :meth:`image` or :meth:`text`."""

    modality: Literal["speech", "image", "text"]
    frontend: SpeechFrontEndConfig | ImageFrontEndConfig | TextFrontEndConfig
    encoder: EncoderConfig
    mask: SpanMask | BlockMask | TokenSpanMask
    targets: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    head_layers: int = 1

    def __post_init__(self) -> None:
        _check_choices(self)
        for name, kind in zip(("frontend", "mask"), _KINDS[self.modality], strict=True):
            given = getattr(self, name)
            _require(
                isinstance(given, kind),
                f"{name} must be a {kind.__name__} for modality {self.modality!r}, got {type(given).__name__}",
            )
        _require(
            self.targets.top_k <= self.encoder.layers,
            f"targets.top_k {self.targets.top_k} must not exceed encoder.layers {self.encoder.layers}",
        )
        _require(self.head_layers >= 1, f"head_layers must be at least 1, got {self.head_layers}")
        is_image = self.modality == "image"
        _require(is_image or not self.encoder.relative_bias, "encoder.relative_bias is for images only")
        if is_image:
            _require(
                self.mask.num_masked < self.frontend.num_patches,
                f"mask.num_masked must be below the {self.frontend.num_patches} patches, got {self.mask.num_masked}",
            )

    @classmethod
    def speech(cls, size: str = "base", *, profile: Profile = "paper") -> "Data2VecConfig":
        """Speech recipe (LibriSpeech), ``size`` "base" or "large" (the large one: base settings at 24 x 1024)."""
        config = cls(
            modality="speech",
            frontend=SpeechFrontEndConfig(),
            encoder=EncoderConfig(**_sized("speech", size, ("base", "large")), layerdrop=0.05, pos_conv_depth=5),
            mask=SpanMask(prob=0.65, length=10),
            targets=TargetConfig(top_k=8, norm="instance"),
            loss=LossConfig(beta=0.0, scale="rsqrt_dim"),
            ema=EMAConfig(decay=0.999, end_decay=0.9999, anneal_updates=30_000, skip=("encoder.pos_conv.",)),
        )
        return config.with_profile(profile)

    @classmethod
    def image(cls, size: str = "base", *, profile: Profile = "paper") -> "Data2VecConfig":
        """Image recipe (ImageNet-1K, 224 pixels), ``size`` "base" or "large"."""
        large = size == "large"
        encoder = EncoderConfig(
            **_sized("image", size, ("base", "large")),
            norm="pre",
            norm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.15 if large else 0.05,
            drop_path=0.2 if large else 0.25,
            layer_scale=1e-5 if large else 1e-4,
            key_bias=False,
            layer_result="block",
            relative_bias=True,
            init="beit",
        )
        config = cls(
            modality="image",
            frontend=ImageFrontEndConfig(),
            encoder=encoder,
            mask=BlockMask(num_masked=120),
            targets=TargetConfig(top_k=6, norm="layer", post_norm="layer"),
            loss=LossConfig(beta=2.0, scale="mean"),
            ema=EMAConfig(decay=0.9998, end_decay=0.9998, anneal_updates=0),
        )
        return config.with_profile(profile)

    @classmethod
    def text(cls, size: str = "base", *, profile: Profile = "paper") -> "Data2VecConfig":
        """Text recipe (RoBERTa-style), ``size`` "base"."""
        config = cls(
            modality="text",
            frontend=TextFrontEndConfig(),
            encoder=EncoderConfig(**_sized("text", size, ("base",))),
            mask=TokenSpanMask(prob=0.35, length=4),
            targets=TargetConfig(top_k=10, norm="layer"),
            loss=LossConfig(beta=4.0, scale=1.0),
            ema=EMAConfig(decay=0.999, end_decay=0.9999, anneal_updates=300_000, skip=("frontend.",)),
            head_layers=2,
        )
        return config.with_profile(profile)

    def with_profile(self, profile: Profile) -> "Data2VecConfig":
        """Set every option in which the paper's text and the released code differ (``docs/numerics.md`` lists them)."""
        _require(profile in ("paper", "fairseq"), f"profile must be 'paper' or 'fairseq', got {profile!r}")
        released = profile == "fairseq"
        return replace(
            self,
            encoder=replace(self.encoder, padding_aware=not released),
            targets=replace(
                self.targets,
                padding_aware=not released,
                teacher_input="masked" if released and self.modality == "text" else "full",
            ),
            loss=replace(self.loss, token_weighted=not (released and self.modality == "image")),
            ema=replace(self.ema, per="micro_batch" if released and self.modality != "image" else "update"),
        )
