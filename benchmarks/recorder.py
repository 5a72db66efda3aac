"""Records what an op launches, on a machine without a GPU: Triton kernels with their arguments, and ATen operators.

Our registered ops are sent to their CUDA implementation with CPU or meta tensors, and every launch of Triton or of the
CUDA extension is noted down instead of run. Memory that nothing touches costs nothing, so the real shapes are used.
Needs a process without TRITON_INTERPRET: interpreted kernels cannot be compiled afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from d2v_fast.kernels import launch, rows
from d2v_fast.ops import _conv0_extension, _dispatch, _extension, _pos_conv_extension

NAMESPACE = "d2v_fast"
NUM_SMS = 132  # of an H100, for launchers that fill the device with persistent programs
CUDA_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = ALLOCATIONS | {"_unsafe_view", "resize_", "set_", "detach_", "lift_fresh", "is_same_size"}
FILLS = {"zeros", "zeros_like", "new_zeros", "zero_", "fill_", "ones", "ones_like", "full", "full_like", "new_full"}
FILLS |= {"scalar_tensor", "arange", "bernoulli_", "uniform_", "random_"}
LAYER_NORMS = {"native_layer_norm", "native_layer_norm_backward"}
CONVOLUTIONS = {"convolution", "convolution_backward"}  # changes of layout inside of cuDNN are not counted
BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"}
SYNCS = {"_local_scalar_dense", "nonzero"}
RESULTS = {"out", "grad_input", "grad_weight", "grad_bias"}  # arguments that are written, not read
GATHERS = {"index", "index_select", "embedding"}  # read the rows they return, not all of their input

# multi_tensor_apply of ATen: tensors per launch for 1, 2, ... lists; blocks per launch; elements per block
FOREACH_TENSORS, FOREACH_BLOCKS, FOREACH_CHUNK = (110, 64, 48, 36, 30), 320, 65536


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel as the launcher made it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Recording:
    """What one call did. ``bytes``: of ATen operators and of the extension, all inputs and outputs once each."""

    triton: list[Launch] = field(default_factory=list)
    extension: list[tuple[str, int, int]] = field(default_factory=list)  # function, launches, bytes of its tensors
    aten: list[tuple[str, int, int]] = field(default_factory=list)  # operator, launches, bytes
    syncs: int = 0
    partials: int = 0  # bytes of the partial sums that our kernels leave to an ATen reduction
    allocated: int = 0  # bytes of all tensors made inside, whether freed again or not
    saved: int = 0  # bytes of the tensors made inside that autograd keeps for backward

    @property
    def launches(self) -> int:
        return len(self.triton) + sum(launches for _, launches, _ in self.aten + self.extension)

    @property
    def kernels(self) -> list[str]:
        return [name for name, *_ in self.extension] + [launch.name for launch in self.triton]

    @property
    def bytes(self) -> int:
        return sum(nbytes for *_, nbytes in self.aten + self.extension)


class Recorder(TorchDispatchMode):
    """Fills a :class:`Recording` with the ATen operators that run below autograd."""

    def __init__(self, num_masked: int | None = None):
        super().__init__()
        self.recording = Recording()
        self.num_masked = num_masked  # rows that a boolean index keeps: meta tensors cannot say
        self.depth = 0  # of calls of our ops
        self.given: set[StorageWeakRef] = set()  # storages that Triton kernels were given
        # storages made inside, and of those the ones that autograd keeps; weak references keep an address from
        # being given to another storage
        self.made: set[StorageWeakRef] = set()
        self.kept: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            self.depth += 1
            try:
                with self:  # what the launcher itself asks of torch counts as well
                    return func.redispatch(CUDA_KEYS, *args, **kwargs)
            finally:
                self.depth -= 1
        name = func._schema.name.split("::")[1]
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        if any(x.dtype == torch.bool for x in indices):
            return self._boolean_index(name, args, indices[0])
        out = func(*args, **kwargs)
        self._count(func, name, args, kwargs, out)
        return out

    def keep(self, x: Tensor) -> Tensor:
        """Hook of autograd: ``x`` is kept for backward. A storage counts once, and not at all if it is an input's."""
        storage = StorageWeakRef(x.untyped_storage())
        if storage in self.made and storage not in self.kept:
            self.kept.add(storage)
            self.recording.saved += x.untyped_storage().nbytes()
        return x

    def _count(self, func, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        outputs = _tensors(out)
        if name in ALLOCATIONS or (outputs and not func.is_view and not name.endswith("_")):
            self.recording.allocated += sum(dense_bytes(x) for x in outputs)
            if name in ALLOCATIONS or name not in FREE:
                self.made.update(StorageWeakRef(x.untyped_storage()) for x in outputs)
        self.recording.syncs += name in SYNCS
        if name in FREE or name in SYNCS or func.is_view:
            return
        inputs = _tensors((args, {key: value for key, value in kwargs.items() if key not in RESULTS}))
        written = _tensors((outputs, _mutated(func, args, kwargs)))
        if name in LAYER_NORMS and not inputs[0].is_contiguous():  # copied inside the operator
            self.recording.aten.append(("contiguous", 1, 2 * dense_bytes(inputs[0])))
        if name in CONVOLUTIONS:
            self._count_convolution(name, inputs, outputs)
            return
        self.recording.aten.append((name, _launches(name, args, inputs), _traffic(name, inputs, written)))
        if self.depth > 0 and name == "sum" and StorageWeakRef(inputs[0].untyped_storage()) in self.given:
            self.recording.partials += dense_bytes(inputs[0])

    def _count_convolution(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        # cuDNN wants contiguous activations; a bias is added, and its gradient summed, by kernels of their own
        operands = inputs[: 2 if name == "convolution" else 3]
        activations = operands[:-1]
        for x in activations:
            if not x.is_contiguous():
                self.recording.aten.append(("contiguous", 1, 2 * dense_bytes(x)))
        if name == "convolution":
            read = sum(map(dense_bytes, operands))
            self.recording.aten.append((name, 1, read + dense_bytes(outputs[0])))
            if len(inputs) > 2:
                self.recording.aten.append(("add_", 1, 2 * dense_bytes(outputs[0])))
            return
        grad, x, weight = operands
        for result in outputs:
            other = {x.shape: weight, weight.shape: x}.get(result.shape)  # neither: the bias
            read = dense_bytes(grad) + (dense_bytes(other) if other is not None else 0)
            self.recording.aten.append((name, 1, read + dense_bytes(result)))

    def _boolean_index(self, name: str, args: tuple, mask: Tensor) -> Tensor:
        # nonzero: count, scan, write, and the host waits for the size
        self.recording.syncs += 1
        self.recording.aten.append(("nonzero", 3, 3 * mask.numel()))
        x = args[0]
        rows = self.num_masked if self.num_masked is not None else int(mask.sum())
        shape = (rows, *x.shape[mask.dim() :])
        nbytes = prod(shape) * x.element_size()
        if name == "index":
            self.recording.aten.append(("index", 1, 2 * nbytes))
            self.recording.allocated += nbytes
            return x.new_empty(shape)
        accumulates = len(args) > 3 and args[3]  # sorts its indices first
        self.recording.aten.append((name, 8 if accumulates else 1, (3 if accumulates else 2) * nbytes))
        return x if name.endswith("_") else torch.empty_like(x)


def dense_bytes(x: Tensor) -> int:
    """Bytes of the elements that exist: expanded dims count once."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0) * x.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    unique = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return list(unique.values())


def _mutated(func, args: tuple, kwargs: dict) -> list[Any]:
    parameters = func._schema.arguments
    given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | kwargs
    return [given.get(x.name) for x in parameters if x.alias_info is not None and x.alias_info.is_write]


def _traffic(name: str, inputs: list[Tensor], written: list[Tensor]) -> int:
    stores = sum(map(dense_bytes, written))
    if name in FILLS:
        return stores
    if name in GATHERS:
        return 2 * stores + sum(dense_bytes(x) for x in inputs if x.dtype in (torch.int32, torch.int64))
    if name in ("copy_", "_foreach_copy_"):
        return sum(map(dense_bytes, inputs))  # the destination is among them, and is not read
    loads = sum(map(dense_bytes, inputs))
    if name in BATCH_NORMS or name == "native_group_norm":  # a pass for the statistics
        loads += dense_bytes(inputs[0])
    if name == "native_group_norm_backward":  # sums, then the gradient
        loads += sum(map(dense_bytes, inputs[:2]))
    if name == "native_layer_norm_backward":  # the weight's pass reads gradient and input again
        loads += sum(map(dense_bytes, inputs[:2])) if len(written) > 1 else 0
    return loads + stores


def _launches(name: str, args: tuple, inputs: list[Tensor]) -> int:
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
        return foreach_launches([x.numel() for x in lists[0]], len(lists))
    if name == "native_layer_norm_backward":
        return 3 if len(inputs) > 4 else 2
    # statistics (and what follows from them for weight and bias), then the normalisation
    return {"native_group_norm": 3, "native_group_norm_backward": 4}.get(name, 2 if name in BATCH_NORMS else 1)


def foreach_launches(sizes: list[int], num_lists: int) -> int:
    """Kernels that ATen's multi_tensor_apply starts for tensors of ``sizes`` elements in ``num_lists`` lists."""
    limit = FOREACH_TENSORS[num_lists - 1]
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for _ in range(-(-size // FOREACH_CHUNK)):
            blocks += 1
            if blocks == FOREACH_BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 1  # the rest of this tensor goes on in the next launch
        if tensors == limit:
            launches, blocks, tensors = launches + (blocks > 0), 0, 0
    return launches + (blocks > 0)


def extension_launches(name: str, args: tuple[Any, ...]) -> int:
    """Kernels that a function of the extension starts; a test holds it to csrc/."""
    if not name.startswith("conv0"):
        return 2 if name == "pos_conv_wgrad_cuda" else 1  # shares of the frames, and their sum
    layer = next(i for i, x in enumerate(args) if isinstance(x, bool))  # behind segments, their table, stride and eps
    ranges = args[layer - 4] is not None  # the table is a kernel, and so is clearing what lies outside
    if name == "conv0_bwd_cuda":
        return 4 + ranges  # weights, the pass, two to add up
    return 2 if args[layer] else 4 + 2 * ranges  # weights and the pass; for group norm two for the moments


class _Extension:
    """Stands for the functions of the extension: launches are noted, questions are answered with 0."""

    def __init__(self, launches: list[tuple[str, int, int]]):
        self._launches = launches

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name.endswith("_cuda"):
                nbytes = sum(map(dense_bytes, _tensors(args)))
                self._launches.append((name, extension_launches(name, args), nbytes))
            return 0

        return call


@contextmanager
def gpu_launchers(num_sms: int, extension: list[tuple[str, int, int]] | None = None) -> Iterator[None]:
    """Launchers take CPU tensors, but choose tiles and grids as for a GPU of ``num_sms`` multiprocessors.

    Launches of the extension are added to ``extension``.
    """
    properties = SimpleNamespace(multi_processor_count=num_sms)
    stand_in = _Extension([] if extension is None else extension)
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),  # autocast knows no meta device
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        mock.patch.object(_extension, "takes", lambda x: True),
        mock.patch.object(_extension, "use_emulated", True),
        mock.patch.object(_extension, "ops", lambda x: stand_in),
        mock.patch.object(_conv0_extension, "_EMULATED_SM_COUNT", num_sms),
        mock.patch.object(_pos_conv_extension, "_EMULATED_SM_COUNT", num_sms),
        mock.patch.object(launch, "interpreted", lambda x: False),
        mock.patch.object(_dispatch, "INTERPRET", True),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        mock.patch.object(rows, "_SM_COUNT", num_sms),
    ):
        yield


def record(function: Callable[[], Any], num_masked: int | None = None, num_sms: int = NUM_SMS) -> Recording:
    """Call ``function`` and return what it launched. Results of Triton kernels are undefined memory."""
    recorder = Recorder(num_masked)

    def run(kernel, *args, grid, warmup, **kwargs):
        recorder.recording.triton.append(Launch(kernel, tuple(grid), args, kwargs))
        recorder.given.update(StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs)))

    saved = torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda x: x)
    launchers = gpu_launchers(num_sms, recorder.recording.extension)
    with launchers, mock.patch.object(JITFunction, "run", run), recorder, saved:
        function()
    return recorder.recording


@dataclass(frozen=True)
class Specialization:
    """What Triton would compile for a launch: types, constants, known divisibility, options."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @property
    def key(self) -> str:
        parts = (self.signature, self.constants, self.attributes, sorted(self.options.items()), self.target)
        return f"{self.kernel.module}.{self.kernel.fn.__name__} {parts}"

    def compile(self) -> triton.compiler.CompiledKernel:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)


class _OfflineDriver:
    """As much of a driver as Triton's launcher asks for before it compiles."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target


def specialize(launch: Launch, arch: int) -> Specialization:
    """Bind the arguments of ``launch`` as ``JITFunction.run`` does on a GPU of compute capability ``arch``."""
    kernel = launch.kernel
    triton.runtime.driver.set_active(_OfflineDriver(arch))
    _, _, target, backend, binder = kernel.device_caches[f"sm_{arch}"]
    bound, specialization, options = binder(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    return Specialization(kernel, signature, constants, attributes, options.__dict__, target)
