"""What the kernels and the whole updates are to reach on an H100, as data.

``publish.py`` writes the tables of ``results/README.md`` from it and holds the results of a GPU against it.
"""

from dataclasses import dataclass

from measured import GRAPH, STEP, STEP_MODE, WRITTEN_AUTOCAST, WRITTEN_TODAY

BOTH = "fwd+bwd"
ROOFLINE = "percent_of_roofline"
FLASH = ("flash-attn 2", "flash-attn 3")

# measure -> what it is called beside a number; {names} are the providers that it compares with
MEASURES = {
    "percent_of_copy": "% of copy",
    "bwd_percent_of_copy": "% of copy",
    "percent_of_roofline": "% of roofline",
    "percent_of_matmul": "% of a matrix product",
    "ms": "ms",
    "host_ms": "ms of host time",
    "speedup": "times {names}",
    "bwd_speedup": "times {names}",
    "wall_speedup": "times {names} in wall time",
    "time_share": "% of the time of {names}",
    "peak_share": "% of the memory of {names}",
    "held_share": "% of the memory of {names}",
}
SHARES = {"peak_share": "peak_mib", "held_share": "held_mib"}  # the number that is compared, ours over theirs
TIMES = {"speedup": "ms", "bwd_speedup": "bwd_ms", "wall_speedup": "wall_ms", "time_share": "ms"}  # theirs over ours


@dataclass(frozen=True)
class Reach:
    """One number to reach, in the worst of the cases of its limit."""

    measure: str  # of MEASURES
    limit: float
    over: tuple[str, ...] = ()  # providers to compare with: the fastest, or the one that needs least
    text: str = "{}"  # how the table puts it
    of: str = "ours"  # the provider whose number it is
    most: bool = False  # the limit must not be exceeded, rather than reached

    def words(self) -> str:
        """For the table."""
        return self.text.format(f"{self.limit:g}")

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.most else value >= self.limit


@dataclass(frozen=True)
class Limit:
    """A line of a table."""

    part: str  # its first cell
    op: str = ""
    cases: tuple[str, ...] = ()  # patterns of names (*) of the cases that must all reach it
    mode: str = BOTH
    cells: tuple[tuple[Reach, ...], ...] = ()  # for each column between the first and the last
    stated: tuple[str, ...] = ()  # instead: what these cells say where no benchmark of a GPU decides
    measured: str = ""  # and the last cell, measured elsewhere
    also: tuple[str, ...] = ()  # cases that must reach it where they were timed


@dataclass(frozen=True)
class Table:
    """Limits with the same columns."""

    name: str  # of its markers
    columns: tuple[str, ...]  # of what is to be reached
    limits: tuple[Limit, ...]
    first: str = "part"


def copy(limit: float) -> tuple[Reach, ...]:
    return (Reach("percent_of_copy", limit),)


def times(limit: float, *over: str, text: str = "{}") -> Reach:
    return Reach("speedup", limit, over, text)


def fairseq(limit: float) -> tuple[Reach, ...]:
    return (times(limit, "fairseq"),)


def compiled(limit: float) -> tuple[Reach, ...]:
    return (times(limit, "eager+compile"),)


def step(recipe: str, ms: float, reference: float, compile_: float) -> Limit:
    """A whole update."""
    cells = (
        (Reach("ms", ms, most=True),),
        (times(reference, "reference"),) if reference else (),
        (times(compile_, "torch.compile"),) if compile_ else (),
        (Reach("host_ms", 2.0, of=GRAPH, most=True),),
        (Reach("peak_share", 60.0, ("reference",), most=True),),
    )
    return Limit(f"`{recipe}`", STEP, (recipe,), STEP_MODE, cells)


NOT_RUN = "not yet run on a GPU"
NO_LIMIT = ("none stated",)

OPS = Table(
    "ops",
    ("% of copy", "times fairseq's eager", "times torch.compile of idiomatic eager"),
    (
        Limit(
            "`data2vec_loss`, instance K=8", "data2vec_loss", ("speech base, instance K=8",),
            cells=(copy(75), fairseq(12), compiled(2.5)),
        ),
        Limit(
            "`data2vec_loss`, layer K=10, and K=6 with post-LN", "data2vec_loss",
            ("text base, layer K=10", "vision base, layer K=6, post-LN"), cells=(copy(80), fairseq(13), compiled(3)),
        ),
        Limit(
            "`ema_update_`, 89 to 630 M parameters", "ema", ("speech base,*", "speech large,*"), "fwd",
            (
                copy(88),
                (*fairseq(4), Reach("wall_speedup", 25, ("fairseq",), "{} in wall time")),
                (times(1.3, "eager", text="{} (foreach)"),),
            ),
            also=("vision huge,*",),
        ),
        Limit(
            "`adamw_ema_`", "adamw_ema", ("speech base,*", "speech large,*"), "fwd",
            (copy(88), fairseq(3), (times(1.2, "eager", text="{} (fused AdamW and foreach)"),)),
        ),
        Limit(
            "`layer_norm_gelu`", "layer_norm_gelu", ("conv 1,*", "conv 4,*", "positions,*"),
            cells=(copy(85), fairseq(4), compiled(1)),
        ),
        Limit(
            "`residual_dropout_layer_norm`", "residual_dropout_layer_norm", ("speech base,*", "vision base scaled,*"),
            cells=(copy(85), fairseq(2.2), compiled(1)),
        ),
        Limit(
            "`bias_gelu`", "bias_gelu", ("speech base,*", "vision base,*"), cells=(copy(85), fairseq(4.4), compiled(1))
        ),
    ),
    "op",
)  # fmt: skip

STEPS = Table(
    "steps",
    ("ms", "times the reference as written", "times torch.compile", "ms of host time", "% of the reference's memory"),
    (
        step("speech_base", 38, 3, 1.3),
        step("text_base", 18, 2.2, 1.05),
        step("image_base", 48, 4, 1.1),
        step("speech_large", 36, 0, 0),
        step("image_large", 80, 0, 0),
    ),
    "recipe",
)

ENCODER_CASES = ("speech, 15 x 780", "images, 128 x 197", "text, 16 x 512")


def patched(part: str, recipe: str, reference: float) -> Limit:
    return Limit(
        part, STEP, (recipe,), STEP_MODE,
        ((Reach("speedup", reference, (WRITTEN_AUTOCAST,), "{} times as fast as unpatched", "patched"),
          Reach("peak_share", 75, (WRITTEN_AUTOCAST,), "{} % of its memory", "patched", most=True)),),
    )  # fmt: skip


OTHERS = Table(
    "others",
    ("to reach",),
    (
        Limit(
            "attention, what the table chooses", "attention", ("speech base,*", "speech base teacher,*", "text base,*"),
            cells=((times(0.95, *FLASH, text="{} of the speed of FlashAttention 2 or 3, direct"),),),
        ),
        Limit(
            "`bias_attention`, ViT-B shapes, both ways", "bias_attention", ("vision base, 128 x 197 x 12, bias,*",),
            cells=(
                (
                    times(1.5, "sdpa_efficient", text="{} times SDPA's memory-efficient kernel, bias in memory"),
                    times(0.6, "flash-attn 2", text="{} of the speed of FlashAttention 2 without a bias"),
                ),
            ),
        ),
        Limit(
            "encoder 12 x 768, both ways: 11 700 frames, 25 216 patches, 8 192 tokens", "encoder", ENCODER_CASES,
            cells=(
                (
                    times(2.2, "fairseq", text="{} times fairseq's and BEiT's eager"),
                    times(1.0, "eager+compile", text="{} times `torch.compile` with SDPA"),
                    Reach("percent_of_matmul", 45, text="{} % of the rate of a large matrix product"),
                ),
            ),
        ),
        Limit(
            "memory of its activations", "encoder", ENCODER_CASES,
            cells=((Reach("held_share", 60, ("eager",), "{} % of eager with SDPA", most=True),),),
        ),
        Limit(
            "packed speech and text, 55 % full", "encoder", ("speech, 15 x 780 fill", "text, 16 x 512 fill"),
            cells=((Reach("time_share", 60, ("d2v_fast padded",), "{} % of the padded time", most=True),),),
        ),
        patched("fairseq's speech base, patched", "speech_base", 2.0),
        Limit(
            "likewise, both under `torch.compile`", stated=("1.1 times as fast as unpatched",),
            measured="no benchmark compiles patched updates",
        ),
        patched("fairseq's text base, patched", "text_base", 1.6),
        patched("BEiT-style ViT-B, patched", "image_base", 2.2),
        Limit(
            "whole update on a CPU, float32: speech 2 x 5 s, text 4 x 512 tokens, images",
            stated=("1.3 times fairseq's; for images plain PyTorch's",),
            measured="speech 1.34 with two threads, 1.35 with one; text 1.42 and 1.34; images (ViT-B, 2 of them) "
            "1.21 and 1.16, **not reached**",
        ),
        Limit(
            "patched updates on a CPU, float32, two threads", stated=("never slower",),
            measured="one round each: speech 1.40, text 1.66, images 1.08 times as fast",
        ),
        Limit("MFU, idle time and GPU utilisation at log steps", stated=NO_LIMIT, measured=NOT_RUN),
    ),
)  # fmt: skip

LAYER_NORM = ("layer norm, 15 *",)
CONVS = Table(
    "convolutions",
    ("to reach", "times fairseq's eager", "times torch.compile of it"),
    (
        Limit(
            "conv0 + norm + GELU, forward", "conv0", LAYER_NORM, "fwd",
            ((Reach("percent_of_copy", 80, text="{} % of copy"),), fairseq(18), (times(5, "fairseq+compile"),)),
        ),
        Limit(
            "conv0 + norm + GELU, backward", "conv0", LAYER_NORM,
            cells=(
                (Reach("bwd_percent_of_copy", 45, text="{} % of copy"),),
                (Reach("bwd_speedup", 14, ("fairseq",)),), (Reach("bwd_speedup", 5, ("fairseq+compile",)),),
            ),
        ),
        Limit(
            "conv0 + group norm + GELU, both ways", "conv0", ("group norm, 15 *",),
            cells=(
                (Reach("percent_of_copy", 60, text="{} % of copy"),), fairseq(12), (times(4, "fairseq+compile"),)
            ),
        ),
        Limit(
            "conv 1 to 6 with norm and GELU, both ways", "strided_conv", ("conv 1-6, 1 *",),
            cells=(
                (Reach("percent_of_roofline", 70, text="{} % of roofline"),), fairseq(4.5),
                (times(2.5, "fairseq+compile"),),
            ),
        ),
        Limit(
            "whole front-end, both ways", "conv_encoder", LAYER_NORM,
            cells=((Reach("ms", 8, text="{} ms", most=True),), fairseq(6), (times(3, "fairseq+compile"),)),
        ),
        Limit(
            "position convolutions 5 x k19, both ways", "pos_conv", ("5 x k19, 15 *",),
            cells=(
                (Reach("percent_of_matmul", 25, text="{} % of a matrix product"),), fairseq(1.8),
                (times(1.4, "fairseq+compile"),),
            ),
        ),
        Limit(
            "memory that the front-end keeps for backward", stated=("60 % of eager's", "", ""),
            measured="counted, [static/cost.md](static/cost.md): 37 % (layer norm), 50 % (group norm)",
        ),
        Limit(
            "the same front-end on a CPU, 4 x 5 s, float32, both ways, layer norm", stated=("", "1.6", ""),
            measured="2.03 with two threads, 2.08 with one",
        ),
        Limit(
            "likewise, group norm (wav2vec 2.0 base)", stated=("", "1.6", ""),
            measured="**not reached**: 1.40 with two threads, 1.42 with one",
        ),
    ),
)  # fmt: skip

TABLES = (OPS, STEPS, OTHERS, CONVS)


@dataclass(frozen=True)
class Headline:
    """A row of the table on the first screen of the README. ``share``: the measure of its limit."""

    name: str
    op: str
    case: str  # a pattern of its name that no other case has
    mode: str = BOTH
    share: str = "percent_of_copy"
    reference: str = ""  # another provider than the usual one


HEADLINES = (
    *(
        Headline(f"update of `{recipe}`", STEP, recipe, STEP_MODE, "percent_of_matmul")
        for recipe in ("speech_base", "text_base", "image_base", "speech_large", "image_large")
    ),
    *(
        Headline(
            f"update of `{recipe}`, reference without TF32", STEP, recipe, STEP_MODE, "percent_of_matmul", WRITTEN_TODAY
        )
        for recipe in ("image_base", "image_large")
    ),
    Headline("`data2vec_loss`, speech base, instance K=8", "data2vec_loss", "speech base, instance K=8"),
    Headline("`data2vec_loss`, text, layer K=10", "data2vec_loss", "text base, layer K=10"),
    Headline("`ema_update_`, 89 M, bf16 copy", "ema", "speech base,*student bfloat16", "fwd"),
    Headline("`adamw_ema_`, 89 M, bf16 copy", "adamw_ema", "speech base,*float32 gradients", "fwd"),
    Headline("`layer_norm_gelu`, speech conv 1", "layer_norm_gelu", "conv 1,*"),
    Headline("`residual_dropout_layer_norm`, speech base", "residual_dropout_layer_norm", "speech base, 15 *"),
    Headline("`bias_attention`, vision base", "bias_attention", "vision base, 128 x 197 x 12, bias, p=0.05"),
    Headline("`conv0_norm_gelu`, speech base, layer norm", "conv0", "layer norm, 15 *"),
    Headline(
        "`conv_encoder`, speech base, layer norm", "conv_encoder", "layer norm, 15 *", share="percent_of_roofline"
    ),
    Headline("`pos_conv`, speech base, 5 x k19", "pos_conv", "5 x k19, 15 *", share="percent_of_roofline"),
)
