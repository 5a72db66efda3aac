"""The CUDA extension on this machine.

python benchmarks/extension_check.py build    # compile it with the nvcc that is here, load it
python benchmarks/extension_check.py run      # every kernel, forward and backward, at small odd sizes

"run" is made for compute-sanitizer: few launches, tensors in allocations of their own, so that a step beyond one is
seen. Results are compared with those of the path without the extension. Exit status 1 with the reason when the
extension cannot be built, does not load, or computes something else.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator

import checkout  # noqa: F401

TOLERANCE = 2e-2  # relative norm; both sides round to 16 bits, several times in a row
Check = tuple[str, Callable[[], list]]


def build() -> None:
    """``d2v_fast.build_extension()``, the README's command."""
    import d2v_fast
    from d2v_fast.ops import _build, _extension

    start = time.perf_counter()
    try:
        path = d2v_fast.build_extension()
        _extension.require()
    except (_build.BuildError, _extension.ExtensionError) as error:
        sys.exit(f"error: {error}")
    print(f"{path}: ready after {time.perf_counter() - start:.0f} s")


def checks(device: str) -> Iterator[Check]:
    """A name and a call for each kernel: the call returns results and gradients."""
    import torch

    from d2v_fast.ops import conv0_norm_gelu, pos_conv

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (scale * torch.randn(shape)).to(device, dtype).requires_grad_()

    def both_ways(function: Callable, *leaves: torch.Tensor) -> Callable[[], list]:
        def call() -> list:
            y = function()
            torch.manual_seed(1)
            grads = torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y))
            return [y.detach(), *grads]

        return call

    segments = torch.tensor([[0, 70], [73, 50], [125, 1]], dtype=torch.int64, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        for norm, k, stride, bias in (("layer", 10, 5, False), ("layer", 3, 2, True), ("group", 10, 5, False)):
            leaves = [random(128, 1, k, dtype=dtype), random(128, dtype=dtype), random(128, dtype=dtype)]
            leaves += [random(128, dtype=dtype)] if bias else []
            for rows, spans in ((2, None), (1, segments)):
                waves = torch.randn(rows, (126 - 1) * stride + k + 1).to(device)

                def conv0(waves=waves, leaves=leaves, stride=stride, norm=norm, spans=spans):
                    weight, gamma, beta, *rest = leaves
                    bias = rest[0] if rest else None
                    return conv0_norm_gelu(waves, weight, bias, gamma, beta, stride=stride, norm=norm, segments=spans)

                name = f"conv0 {norm} k{k} {dtype}" + (", segments" if spans is not None else "")
                yield name, both_ways(conv0, *leaves)
        for width, kernel, depth in ((48, 19, 2), (64, 4, 1), (80, 128, 1)):
            C = 2 * width
            weights = [random(C, width, kernel, scale=(width * kernel) ** -0.5, dtype=dtype) for _ in range(depth)]
            biases = [random(C, scale=0.1, dtype=dtype) for _ in range(depth)]
            for rows, spans in ((1, None), (1, segments)):
                x = random(rows, 133, C, dtype=dtype)

                def positions(x=x, weights=weights, biases=biases, spans=spans, norm=depth > 1):
                    return pos_conv(x, weights, biases, groups=2, norm=norm, segments=spans)

                name = f"pos_conv {width} k{kernel} {dtype}" + (", segments" if spans is not None else "")
                yield name, both_ways(positions, x, *weights, *biases)


def run() -> None:
    """Every kernel once; ends the process with status 1 when one computes something else."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch starts CUDA
    import torch
    from common import without_extension

    from d2v_fast.ops import _extension

    try:
        _extension.require()
    except _extension.ExtensionError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(0)
    wrong = compare(checks("cuda"), without_extension)
    if wrong:
        sys.exit("error: " + "; ".join(wrong))
    print("every kernel agrees with the path without the extension")


def compare(calls: Iterator[Check], without: Callable) -> list[str]:
    """What differs from the path without the extension, by name."""
    wrong = []
    for name, call in calls:
        results = call()
        with without():
            expected = call()
        for index, (a, b) in enumerate(zip(results, expected, strict=True)):
            error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
            if not error <= TOLERANCE:  # NaN as well
                wrong.append(f"{name}: result {index} differs by {error:.1e}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("build", "run"))
    action = parser.parse_args().action
    build() if action == "build" else run()


if __name__ == "__main__":
    main()
