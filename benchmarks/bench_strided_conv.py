"""Convolutions 1 to 6 of the speech front-end, each with norm and GELU, one by one and in a row.

python benchmarks/bench_strided_conv.py            # on a GPU; --smoke elsewhere

As in the front-end, the 15 clips of 15.6 s lie one after the other in one row, for all providers alike.
"""

import fairseq_eager
from cli import main
from conv_providers import CONV_PROVIDERS
from conv_shapes import SAMPLES, conv_case, conv_inputs, conv_passes, minimal_bytes, steps
from driver import Bench, Case


def layers(first: int, last: int, name: str = "", B: int = 1, S: int = 15 * SAMPLES, **arguments) -> Case:
    """Layers ``first`` to ``last`` at the steps that S samples leave for them."""
    name = name or (f"conv {first}-{last}" if last > first else f"conv {first}")
    return conv_case(name, B, steps(S, 0, first - 1)[-1], first=first, last=last, **arguments)


BENCH = Bench(
    op="strided_conv",
    cases=[
        layers(1, 6),
        layers(1, 1),
        layers(4, 4, main=False),
        layers(5, 5, main=False),
        layers(2, 2, main=False),
        layers(3, 3, main=False),
        layers(6, 6, main=False),
        layers(1, 6, "conv 1-6, no norm", norm="group", main=False),
        layers(1, 6, "conv 1-6, batch", B=15, S=SAMPLES, main=False),
        layers(1, 6, "conv 1-6 fp32", dtype="float32", main=False),
    ],
    smoke=[
        layers(1, 6, "smoke", S=3200, B=2, C=64, dtype="float32"),
        layers(4, 5, "smoke no norm", S=8000, B=2, C=64, norm="group", dtype="float32"),
    ],
    inputs=conv_inputs,
    exact=fairseq_eager.conv_encoder,
    providers=CONV_PROVIDERS,
    minimal_bytes=minimal_bytes(conv_passes),
    passes=conv_passes,
    differentiable=["x", "weights", "biases", "norm_weights", "norm_biases"],
    low_tolerance=4.0,  # six layers round one after the other
    checked_with={"S": 20_000},  # float64 of all of them would not fit
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)
