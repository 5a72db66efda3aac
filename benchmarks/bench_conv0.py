"""The first convolution of the speech front-end with its norm and GELU: waveforms to 512 channels.

python benchmarks/bench_conv0.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
from cli import main
from conv_providers import CONV_PROVIDERS
from conv_shapes import conv_case, conv_inputs, conv_passes, minimal_bytes
from driver import Bench, Case


def case(name: str, norm: str = "layer", **arguments) -> Case:
    return conv_case(name, first=0, last=0, norm=norm, **arguments)


BENCH = Bench(
    op="conv0",
    cases=[
        case("layer norm"),
        case("group norm", "group"),
        case("layer norm large", B=4, S=300_000, main=False),
        case("layer norm, conv bias", bias=True, main=False),
        case("layer norm fp16", dtype="float16", main=False),
        case("layer norm fp32", dtype="float32", main=False),
    ],
    smoke=[
        case("smoke", B=2, S=1603, C=64, dtype="float32"),
        case("smoke group", "group", B=2, S=1603, C=64, dtype="float32"),
    ],
    inputs=conv_inputs,
    exact=fairseq_eager.conv_encoder,
    providers=CONV_PROVIDERS,
    minimal_bytes=minimal_bytes(conv_passes),
    passes=conv_passes,
    differentiable=["weights", "biases", "norm_weights", "norm_biases"],
    checked_with={"B": 2, "S": 80_000},  # float64 of a whole batch would not fit
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)
