"""pytest benchmarks/bench_x.py: every case, mode and provider of a bench file as a pytest-benchmark entry.

On a GPU the table of pytest-benchmark shows wall-clock times up to the end of the device's work. Elsewhere every
provider is checked and called once, and nothing is timed.
"""

import pytest
import torch
from common import synchronize
from driver import NotInstalled, check, exact_results, make_call, make_inputs


def pytest_generate_tests(metafunc):
    if "timed" not in metafunc.fixturenames:
        return
    bench = metafunc.module.BENCH
    gpu = torch.cuda.is_available()
    rows = [
        pytest.param((bench, case, mode, name), id=f"{case.name}-{mode}-{name}".replace(" ", "_"))
        for case in (bench.cases if gpu else bench.smoke)
        for mode in bench.modes
        for name, provider in bench.providers.items()
        if case.main and (gpu or not provider.compiled)  # compiling on a CPU takes longer than it tells
    ]
    metafunc.parametrize("timed", rows, indirect=True)


@pytest.fixture
def timed(request):
    """Checks one provider against float64, then hands its call to pytest-benchmark."""
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    bench, case, mode, name = request.param
    provider = bench.providers[name]
    try:
        function = provider.load()
    except NotInstalled as missing:
        pytest.skip(f"{missing} is not installed")
    check(bench, case, mode, provider, function, exact_results(bench, case, mode))
    call = make_call(bench, case, mode, function, make_inputs(bench, case, provider))

    def run():
        call()
        synchronize()

    run()
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{bench.op}: {case.name}, {mode}"
    benchmark.disabled = not torch.cuda.is_available()
    return lambda: benchmark(run)
