"""``d2v_fast.info()``: what is installed, what each op runs on, and what to change."""

import importlib.metadata
import importlib.util
import os
import platform

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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def info() -> str:
    """A report of versions, devices, the implementation behind each op, thread settings, and advice."""
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
    cores, threads = _cores(), torch.get_num_threads()
    omp = os.environ.get("OMP_NUM_THREADS", "unset")
    lines.append(f"threads       {cores} cores, torch uses {threads}, OMP_NUM_THREADS={omp}")
    return "\n".join([*lines, *_advice(torch, threads, omp, INTERPRET)])


def _advice(torch, threads: int, omp: str, interpreted: bool) -> list[str]:
    advice = []
    if torch.cuda.is_available() and omp == "unset" and threads > 4:
        advice.append("advice: set OMP_NUM_THREADS=1 when training on a GPU; many CPU threads starve the data loader")
    if interpreted:
        advice.append("advice: TRITON_INTERPRET=1 is for tests; it is hundreds of times slower than the reference")
    return advice
