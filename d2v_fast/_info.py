"""``d2v_fast.info()``: what is installed, what each op runs on, and what to change."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "apex", "transformers", "ve-fairseq")
OPS = (
    "masked_smooth_l1",
    "layer_targets",
    "data2vec_loss",
    "layer_norm_gelu",
    "residual_dropout_layer_norm",
    "bias_gelu",
    "ema_update_",
    "adamw_ema_",
    "l2_norm",
    "bias_attention",
)
# the general path of each on a GPU, where the extension is not used
EXTENSION = {
    "conv0_norm_gelu": "PyTorch matrix products",
    "pos_conv": "cuDNN convolutions and Triton",
}
FALLBACK = ("ema_update_", "adamw_ema_", "l2_norm")  # run on a GPU without Triton, from PyTorch's own operators


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time in each period, or "max"


def _cores() -> int:
    """Cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit
        return count


def info(run: str | os.PathLike[str] | None = None) -> str:
    """A report of versions, devices, the implementation behind each op, thread settings, and advice.

    With ``run``, the folder of a pretraining run (which needs the train extra), also where its time went, what it
    skipped, and what to change.

    Raises:
        DataError: ``run`` is no folder of a run.
    """
    import torch

    from d2v_fast import __version__
    from d2v_fast.nn import attention_backends
    from d2v_fast.ops import _extension
    from d2v_fast.ops._dispatch import INTERPRET
    from d2v_fast.patches import _versions

    lines = [
        f"d2v_fast      {__version__}",
        f"python        {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton        {_version('triton')}",
        f"numpy         {_version('numpy')}",
        *(f"{name:<13} {_version(name)}" for name in OPTIONAL),
    ]
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        lines += [
            f"GPU {i}         {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            for i, gpu in enumerate(gpus)
        ]
    else:
        lines.append("GPU           none: everything runs on the CPU")
    has_triton = importlib.util.find_spec("triton") is not None
    cuda = dict.fromkeys(OPS, "Triton kernel" if has_triton else "NOT AVAILABLE (install triton)")
    if not has_triton:
        cuda |= dict.fromkeys(FALLBACK, "PyTorch multi-tensor operators, slower (install triton)")
    cpu = "Triton interpreter (TRITON_INTERPRET=1)" if INTERPRET else "PyTorch reference"
    lines += [f"op {op:<27} CUDA: {cuda[op]}; CPU: {cpu}" for op in OPS]
    why_not = _extension.why_not()
    extension = {op: general if why_not else "CUDA C++ kernel" for op, general in EXTENSION.items()}
    lines += [f"op {op:<27} CUDA: {extension[op]}; CPU: PyTorch" for op in EXTENSION]
    lines.append("op strided_conv                CUDA and CPU: PyTorch matrix products")
    lines.append(f"extension     {'not used: ' + why_not if why_not else 'loaded'}")
    lines += [f"              {text}" for text in _extension.describe()]
    lines += [f"attention     {text}" for text in attention_backends.report()]
    lines += [f"drop-in       {text}" for text in _versions.report()]
    cores, threads, processes = _cores(), torch.get_num_threads(), _processes(torch)
    omp = os.environ.get("OMP_NUM_THREADS", "unset")
    lines.append(
        f"threads       cores: {cores}, processes: {processes}, torch uses {threads} in each, OMP_NUM_THREADS={omp}"
    )
    advice = _advice(torch.cuda.is_available(), cores, threads, processes, omp)
    if INTERPRET:
        advice.append("advice: TRITON_INTERPRET=1 is for tests; it is hundreds of times slower than the reference")
    about = []
    if run is not None:
        from d2v_fast.train.doctor import examine

        about = [*examine(Path(run), cores), ""]  # in front, as all the rest is long
    return "\n".join([*about, *lines, *advice])


def _processes(torch) -> int:
    """Training processes on this machine: those that torchrun started, or would start, one for each GPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or max(1, torch.cuda.device_count())


def _advice(gpu: bool, cores: int, threads: int, processes: int, omp: str) -> list[str]:
    """What to change in the settings of threads: many of them starve the data loader, and each other."""
    each = max(1, cores // processes)
    if gpu and omp == "unset" and threads > 4:
        return ["advice: set OMP_NUM_THREADS=1 when training on a GPU; many CPU threads starve the data loader"]
    if threads * processes > cores:
        wanted = 1 if gpu else each
        there = f"{cores} core{'s' * (cores > 1)}"
        return [f"advice: {processes} x {threads} threads are more than {there}: set OMP_NUM_THREADS={wanted}"]
    if not gpu and omp != "unset" and threads < each:
        return [f"advice: training on the CPU would use more of its cores with OMP_NUM_THREADS={each}"]
    return []
