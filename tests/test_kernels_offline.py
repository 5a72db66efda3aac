"""Compile every Triton kernel for real GPUs on a machine without one, and look at the machine code.

The compilation runs in its own process (this file, as a script): under TRITON_INTERPRET=1 nothing can be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ARCHS = (80, 90)
INT, DIVISIBLE = "i32", "i32/16"  # the latter: a multiple of 16, which the launcher sees in the argument
TARGETS = {
    "table_ptr": "*i64", "stats_ptr": "*fp32", "positions_ptr": "*i32", "out_ptr": "*fp32", "num_rows": INT,
    "num_frames": INT, "T": INT, "C": DIVISIBLE, "K": INT, "stats_rows": INT, "stride_b": DIVISIBLE,
    "stride_t": DIVISIBLE, "eps": "fp32",
}  # fmt: skip
STATS = {
    "table_ptr": "*i64", "lengths_ptr": "*i32", "stats_ptr": "*fp32", "B": INT, "T": INT, "C": DIVISIBLE,
    "stride_b": DIVISIBLE, "stride_t": DIVISIBLE, "eps": "fp32",
}  # fmt: skip


def _loss(backward: bool, pred: str, target: str, squared: bool) -> tuple:
    sizes = {"N": INT, "D": DIVISIBLE, "beta": "fp32", "scale": "fp32"}
    signature = {"pred_ptr": pred, "target_ptr": target, "mask_ptr": "*i1"}
    strides = {"stride_pred": DIVISIBLE, "stride_target": DIVISIBLE}
    if backward:
        signature = {"grad_ptr": "*fp32", **signature, "grad_pred_ptr": pred, **sizes, "stride_grad": INT, **strides}
    else:
        signature = {**signature, "loss_ptr": "*fp32", **sizes, **strides}
    kernel = "_masked_smooth_l1_bwd_kernel" if backward else "_masked_smooth_l1_fwd_kernel"
    return "masked_smooth_l1", kernel, signature, {"HAS_MASK": True, "SQUARED": squared}


def _targets(dtype: str, norm: str, post: bool) -> tuple:
    flags = {"DTYPE": dtype, "ALIGNED": True, "NORM": norm, "POST_LAYER_NORM": post, "HAS_POSITIONS": True}
    return "layer_targets", "_layer_targets_kernel", TARGETS, flags


def _stats(dtype: str, has_lengths: bool) -> tuple:
    flags = {"DTYPE": dtype, "ALIGNED": True, "HAS_LENGTHS": has_lengths, "RSTD": True}
    return "layer_targets", "_column_stats_kernel", STATS, flags


def _ema(student: str, has_copy: bool) -> tuple:
    signature = {"table_ptr": "*i64", "num_tensors": INT, "decay_ptr": "*fp64", "weight": "fp32"}
    flags = {"STUDENT_DTYPE": student, "COPY_DTYPE": "bf16", "HAS_COPY": has_copy, "HAS_DECAY": has_copy}
    flags |= {"ALIGNED": True, "LANES": 256}
    return "ema", "_ema_update_kernel", signature, flags


# name -> (module, kernel, signature, constants, width of a row), the launchers' tiles are added below
KERNELS = {
    "loss_fwd_bf16_768": (*_loss(False, "*bf16", "*fp32", False), 768),
    "loss_bwd_bf16_768": (*_loss(True, "*bf16", "*fp32", True), 768),
    "loss_bwd_fp32_1024": (*_loss(True, "*fp32", "*fp32", False), 1024),
    "targets_instance_bf16": (*_targets("bf16", "instance", False), 768),
    "targets_layer_bf16": (*_targets("bf16", "layer", False), 768),
    "targets_layer_post_fp32": (*_targets("fp32", "layer", True), 1024),
    "targets_instance_post_bf16": (*_targets("bf16", "instance", True), 768),
    "stats_bf16": (*_stats("bf16", True), 768),
    "ema_fp32": (*_ema("fp32", False), 0),
    "ema_bf16_copy": (*_ema("bf16", True), 0),
}
LOADS_ONLY = {"loss_fwd_bf16_768", "stats_bf16"}  # they store one value per row


@pytest.fixture(scope="module")
def machine_code():
    """{name: {arch: {instruction: count}}} of every kernel."""
    tools = _tools()
    if tools is None:
        pytest.skip("triton's nvidia tools (ptxas, nvdisasm) are not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, str(tools)], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _tools() -> Path | None:
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").exists() and (folder / "ptxas").exists() else None


def _count(instructions: dict[str, int], *prefixes: str) -> int:
    return sum(n for name, n in instructions.items() if name.startswith(prefixes))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_vector_accesses(machine_code, name, arch):
    instructions = machine_code[name][str(arch)]
    assert _count(instructions, "LDL", "STL") == 0, instructions
    assert _count(instructions, "LDG.E.128") >= 1, instructions
    if name not in LOADS_ONLY:
        assert _count(instructions, "STG.E.128") >= 1, instructions
    if not name.startswith("ema"):  # whose last, partial block is masked element by element
        assert _count(instructions, "LDG.E.U16") == 0, instructions


@pytest.mark.parametrize("arch", ARCHS)
def test_pointer_table_compiles(machine_code, arch):
    assert _count(machine_code["pointer_table"][str(arch)], "STG.E.64", "STG.E.128") >= 1


def test_every_kernel_is_covered():
    """A new kernel in a module that is checked here has to be listed here."""
    root = Path(__file__).resolve().parent.parent / "kernels"
    for module in ("masked_smooth_l1", "layer_targets", "ema"):
        defined = set(re.findall(r"def (_\w+_kernel)\(", (root / f"{module}.py").read_text()))
        assert defined == {kernel for owner, kernel, *_ in KERNELS.values() if owner == module}


def _tile(module, kernel: str, width: int, constants: dict) -> tuple[dict, int]:
    """The block sizes and warps that the launcher takes on a GPU; meta tensors carry the shape."""
    import torch

    if module.__name__.endswith("ema"):
        config = module.chunks.GPU_CONFIG
        return {"BLOCK": config.block, "CHUNK": config.chunk}, config.num_warps
    if module.__name__.endswith("masked_smooth_l1"):
        config = module.config_for(torch.empty(4, width, device="meta"))
        return {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}, config.num_warps
    whole_rows = constants.get("NORM") == "layer" or constants.get("POST_LAYER_NORM", False)
    config = module.config_for(torch.empty(1, 4, width, device="meta"), whole_rows)
    if kernel == "_column_stats_kernel":
        return {"BLOCK_T": config.block_t, "BLOCK_C": config.block_c_stats}, 4
    return {"BLOCK_N": config.block_n, "BLOCK_C": config.block_c}, config.num_warps


def _compile(kernel, signature: dict, constants: dict, arch: int, num_warps: int, tools: Path) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    types = {n: signature.get(n, "constexpr") for n in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, t in enumerate(types.values())
        if isinstance(t, str) and (t.startswith("*") or t == DIVISIBLE)
    }
    types = {n: INT if t == DIVISIBLE else t for n, t in types.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)[A-Z0-9.]*)", sass))


def main(tools: Path) -> None:
    import importlib

    import triton.language as tl

    from d2v_fast.kernels import launch

    found = {}
    for name, (module_name, kernel_name, signature, constants, width) in KERNELS.items():
        module = importlib.import_module(f"d2v_fast.kernels.{module_name}")
        tile, num_warps = _tile(module, kernel_name, width, constants)
        dtypes = {"bf16": tl.bfloat16, "fp32": tl.float32}
        constants = {k: dtypes.get(v, v) if k.endswith("DTYPE") else v for k, v in constants.items()} | tile
        kernel = getattr(module, kernel_name)
        found[name] = {a: _compile(kernel, signature, constants, a, num_warps, tools) for a in ARCHS}
    signature = {"table_ptr": "*i64", "tensors": ("*bf16",) * 8, "first": INT}
    found["pointer_table"] = {a: _compile(launch._pointer_table_kernel, signature, {}, a, 1, tools) for a in ARCHS}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
