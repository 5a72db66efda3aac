"""The convolutional position embedding: five layers of 19 taps with layer norm (data2vec), or one of 128 without.

python benchmarks/bench_pos_conv.py            # on a GPU; --smoke elsewhere

Weight norm, which wav2vec 2.0 puts in front of its 128 taps, costs the same everywhere and is left out.
"""

import fairseq_eager
from cli import main
from conv_providers import POSITION_PROVIDERS
from conv_shapes import minimal_bytes, position_inputs, position_passes
from driver import Bench, Case


def case(
    name: str, B: int, T: int, C: int, kernel: int = 19, depth: int = 5, G: int = 16, dtype: str = "bfloat16",
    main: bool = True,
) -> Case:  # fmt: skip
    sizes = {"B": B, "T": T, "C": C, "G": G, "kernel": kernel, "depth": depth}
    options = {"groups": G, "norm": depth > 1, "eps": 1e-5}
    return Case(f"{name}, {B} x {T} x {C}", dtype, sizes, options, main)


BENCH = Bench(
    op="pos_conv",
    cases=[
        case("5 x k19", 15, 780, 768),
        case("5 x k19 large", 4, 938, 1024),
        case("k128", 15, 780, 768, kernel=128, depth=1),
        case("5 x k19 fp16", 15, 780, 768, dtype="float16", main=False),
        case("k128 large", 4, 938, 1024, kernel=128, depth=1, main=False),
    ],
    smoke=[
        case("smoke", 2, 37, 64, kernel=5, depth=3, G=2, dtype="float32"),
        case("smoke even", 2, 37, 64, kernel=8, depth=1, G=2, dtype="float32"),
    ],
    inputs=position_inputs,
    exact=fairseq_eager.pos_conv,
    providers=POSITION_PROVIDERS,
    minimal_bytes=minimal_bytes(position_passes),
    passes=position_passes,
    differentiable=["x", "weights", "biases"],
    low_tolerance=4.0,  # five layers round one after the other
    checked_with={"B": 2, "T": 300},  # cuDNN takes its time for grouped convolutions in float64
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)
