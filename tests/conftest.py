"""Settings of the whole suite. With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU."""

import emulator
import pytest
import torch
from checks import INTERPRET

if INTERPRET:
    import triton_interpreter

    triton_interpreter.install()

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # PyTorch's float32 convolutions are what ours are compared with


# Begun first, the longest before the others (--no-loadscope-reorder keeps that order): at the end, one of these would
# run on one core while the other is idle.
LONG = (
    "fairseq_runs",
    "test_faults",
    "test_distributed_runs",
    "test_kernels_offline",
    "test_distributed_steps",
    "test_launcher",
    "test_train_loop",
    "test_emulator",
    "test_static_cost",
    "test_packaging",
    "test_run_checkpoints_ranks",
    "test_run_lock",
    "test_benchmarks",
    "test_demo",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if torch.cuda.is_available() and not INTERPRET:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Fill torch.empty with NaN, so that a kernel which leaves an output element out fails."""
    settings = torch.utils.deterministic
    saved = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    settings.fill_uninitialized_memory = saved[0]
    torch.use_deterministic_algorithms(saved[1])


@pytest.fixture
def emulated(monkeypatch):
    """CPU tensors take the path of CUDA tensors: the sources of csrc/ run in the emulator, bindings included."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU of this machine, not in the emulator")
    emulator.use(monkeypatch)
