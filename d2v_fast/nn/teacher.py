"""The teacher: an exponential moving average of the student (paper section 3.2; fairseq ``EMAModule``)."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.nn.config import EMAConfig
from d2v_fast.nn.low_precision import LowPrecisionCopy
from d2v_fast.ops import ema_update_
from d2v_fast.ops._lists import is_plain, layout, local_shard


class _Slot(NamedTuple):
    """A tensor where it was found: ``owner[name] is tensor`` until someone replaces it."""

    owner: dict[str, Tensor]
    name: str
    tensor: Tensor
    requires_grad: bool


class _Pairs(NamedTuple):
    """Tensors of the teacher and of the student, by what happens to them; and where all were found."""

    averaged: list[tuple[Tensor, Tensor]]
    shared: list[tuple[Tensor, Tensor]]
    copied: list[tuple[Tensor, Tensor]]
    slots: list[_Slot]
    counts: list[tuple[dict, int]]  # parameters, buffers and children of every module

    def valid(self) -> bool:
        """Whether nothing was added, replaced, frozen or unfrozen since; finding the pairs costs ten times more."""
        for owner, count in self.counts:
            if len(owner) != count:
                return False
        for owner, name, x, requires_grad in self.slots:  # a plain loop: this runs once per update
            if owner.get(name) is not x or x.requires_grad != requires_grad:
                return False
        return True


class EMATeacher(nn.Module):
    """A frozen fp32 copy of ``student``, always in eval mode, that follows it.

    ``module`` is the copy. Parameters are averaged, except those that ``skip`` names and frozen ones: these are the
    student's values after every update. Buffers are copied, whatever their dtype. Being a submodule of the model, the
    teacher moves, saves and loads with it, but stays float32 when the model becomes bfloat16 or float16: averages move
    by less than those can hold. Parameters that are DTensors (FSDP2) are averaged shard by shard,
    without communication; shard ``module`` as the student is sharded, inside of :meth:`sharding`.

    Args:
        student: float32, bfloat16 or float16 parameters, contiguous or otherwise dense.
        schedule: the decay.
        skip: names of parameters or of modules that hold them ("frontend", "encoder.pos_conv."). The teacher's share
            the student's memory where device and dtype allow, also after moves, deep copies and loads; only values
            that a load or a conversion made differ from the student's stay apart, until the next update.
        share: False copies them at every update instead.
        copies: bfloat16 or float16: under autocast to it, :meth:`network` has the averaged matrices in this dtype,
            written by :meth:`update_` in the pass that moves the averages, so that no forward casts them. They take
            half the averages' memory from the first such forward on, are no part of the state, and follow moves, deep
            copies and loads.

    Raises:
        TypeError: ``student`` is no module, ``skip`` a string, or ``copies`` another dtype.
        ValueError: an entry of ``skip`` matches no parameter, or a parameter to be averaged is not dense.
    """

    def __init__(
        self,
        student: nn.Module,
        schedule: EMAConfig,
        skip: tuple[str, ...] = (),
        *,
        share: bool = True,
        copies: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a module, got {type(student).__name__}")
        if isinstance(skip, str):
            raise TypeError(f"skip must be a tuple of names, got the string {skip!r}")
        if copies not in (None, torch.bfloat16, torch.float16):
            raise TypeError(f"copies must be torch.bfloat16, torch.float16 or None, got {copies}")
        names = [name for name, _ in student.named_parameters()]
        for prefix in skip:
            if not any(_within(name, prefix) for name in names):
                raise ValueError(f"skip: no parameter of the student starts with {prefix!r}; it has {names[:3]} ...")
        self._student = (student,)  # in a tuple, so that it is not registered as a part of the teacher
        self.schedule, self.skip, self.share, self.copies = schedule, tuple(skip), share, copies
        self.module = copy.deepcopy(student).float().requires_grad_(False)
        self._found: _Pairs | None = None
        self._last_update: int | None = None
        self._low: LowPrecisionCopy | None = None
        self._sharded = self._follows = False  # whether parameters are DTensors, and those of skip known to be equal
        self._share(self._pairs())
        self._check_layouts()
        self.register_load_state_dict_post_hook(_share_again)  # runs as well when the load raises in the end
        self.eval()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode: the teacher has no dropout, DropPath or LayerDrop."""
        return super().train(False)

    def averages(self) -> dict[nn.Parameter, nn.Parameter]:
        """Student parameter -> its average, for an optimizer that moves the averages itself (``optim.AdamWEMA``)."""
        return {theirs: mine for mine, theirs in self._pairs().averaged}

    @torch.no_grad()
    def update_(
        self,
        update: int,
        *,
        again: bool = False,
        averaged: bool = False,
        skip: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> float:
        """Move towards the student as it is after ``update`` optimizer updates; return the schedule's decay.

        A second call with the same ``update`` does nothing. A decay of 1 leaves the averages as they are (fairseq), and
        still copies the rest.

        Args:
            update: completed optimizer updates.
            again: step even so (fairseq data2vec 1.0 steps once per micro-batch).
            averaged: the averages have been moved already; only the rest is left to do.
            skip: [] fp32 or fp64 on the device; the averages stay as they are unless it is 0.
            decay: [] fp32 or fp64 on the device, read there instead of the schedule's, as a captured CUDA graph needs.

        Raises:
            TypeError: ``skip`` or ``decay`` is not a tensor.
            ValueError: student and teacher no longer have the same tensors, or are sharded or laid out differently.
        """
        for name, x in (("skip", skip), ("decay", decay)):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        scheduled = self.schedule.decay_at(update)
        if update == self._last_update and not again:
            return scheduled
        pairs = self._pairs()
        if averaged:
            self._refresh()
        elif pairs.averaged and (decay is not None or scheduled < 1):
            used = scheduled if decay is None else decay
            if skip is not None:
                used = torch.where(skip == 0, used, torch.ones_like(skip, dtype=torch.float64))
            self._average(pairs, used)
        self.follow_()
        self.note_update(update)
        return scheduled

    @torch.no_grad()
    def follow_(self) -> None:
        """Take over from the student what is not averaged, as every update does; shards without communication."""
        pairs = self._pairs()
        self._share(pairs)
        for mine, theirs in pairs.copied:
            _copy(mine, theirs)
        for mine, theirs in pairs.shared:
            if local_shard(mine).data_ptr() != local_shard(theirs).data_ptr():
                _copy(mine, theirs)
        self._follows = True

    @contextmanager
    def sharding(self) -> Iterator[None]:
        """Around ``fully_shard`` (FSDP2) of student and ``module``, the same layers in both.

        From then on what is shared is copied at every update, as shards are memory of their own, and there are no
        low-precision copies: the forward gathers parameters in the precision that FSDP2 is told.
        """
        self._unshare()
        self.share, self.copies, self._low = False, None, None
        yield
        self._sharded = True
        self.follow_()

    def note_update(self, update: int) -> None:
        """Take ``update`` as done: a replayed CUDA graph did what :meth:`update_` does."""
        self._last_update = update

    def _average(self, pairs: _Pairs, decay: float | Tensor) -> None:
        """Move the averages, writing the low-precision copies in the same pass."""
        low = self._copied(pairs)
        for each, copies in [(pairs.averaged, None)] if low is None else low.updates:
            mine, theirs = zip(*map(_shards, each), strict=True)
            ema_update_(mine, theirs, decay, copies=copies)
        if low is not None:
            low.note_()

    def shares(self, name: str) -> bool:
        """Whether every parameter of the part ``name`` of ``module`` is the student's own memory, or shards like it."""
        parameters = self.module.get_submodule(name).named_parameters(name)
        if not all(any(_within(path, prefix) for prefix in self.skip) for path, _ in parameters):
            return False
        if self._sharded:  # known without a look: parameters are gathered while this is asked
            return self._follows
        if not torch.compiler.is_compiling():
            self._note_sharing(self._pairs())
        return self._shares_all

    def network(self, device_type: str) -> nn.Module:
        """What to run on ``device_type``: ``module``, or under autocast to ``copies`` the same with its matrices cast.

        Bit-equal to running ``module``. Masters written by other means than this class are noticed, outside of
        ``torch.compile`` and if not through ``.data``; hooks on ``module`` that were registered later do not run.
        """
        if self.copies is None or not torch.is_autocast_enabled(device_type):
            return self.module
        if torch.get_autocast_dtype(device_type) != self.copies:
            return self.module
        if torch.compiler.is_compiling():  # no memory is set up, and no version read, in a graph
            return self.module if self._low is None else self._low.module
        pairs = self._pairs()
        with torch.inference_mode(False):  # updates write the copies outside of it
            if self._copied(pairs) is None:
                self._low = LowPrecisionCopy(self.module, self.copies, pairs.averaged)
            elif self._low.stale():
                self._low.refresh_()
        return self._low.module

    def _copied(self, pairs: _Pairs) -> LowPrecisionCopy | None:
        """The low-precision copies, if there are any of these very parameters."""
        return None if self._low is None or self._low.averaged is not pairs.averaged else self._low

    def _refresh(self) -> None:
        """After the averages were written, or other parameters put in their place."""
        self._low = self._copied(self._pairs())
        if self._low is not None:
            self._low.refresh_()

    def ema_state(self) -> dict[str, Tensor]:
        """Everything the teacher consists of, by the student's names: float32 parameters, and buffers as they are.

        This is what fairseq keeps under ``_ema`` (``EMAModule.fp32_params``), relative to the module that is tracked.
        The tensors are the teacher's own: clone what has to stay.
        """
        return {name: x.detach() for name, x in self.module.state_dict().items()}

    @torch.no_grad()
    def load_ema_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a dictionary such as :meth:`ema_state` returns, in any float dtype and on any device.

        Parameters of ``skip`` are the student's again after the next update.

        Raises:
            ValueError: names are missing or unknown, or a shape differs; nothing is changed then.
            TypeError: a value is not a tensor; nothing is changed then.
        """
        own = self.module.state_dict()
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(f"state must have the student's names; missing: {missing[:3]}, unknown: {unknown[:3]}")
        for name, x in own.items():
            if not isinstance(state[name], Tensor):
                raise TypeError(f"state[{name!r}] must be a tensor, got {type(state[name]).__name__}")
            if x.shape != state[name].shape:
                raise ValueError(f"state[{name!r}] must have shape {tuple(x.shape)}, got {tuple(state[name].shape)}")
        self._unshare()
        for name, x in self.module.state_dict().items():
            x.copy_(state[name])
        self._refresh()

    def _pairs(self) -> _Pairs:
        """The pairs; found anew when the parameters have changed since the last call."""
        if self._found is None or not self._found.valid():
            mine, theirs = _slots(self.module), _slots(self._student[0])
            if mine.keys() != theirs.keys():
                changed = sorted(mine.keys() ^ theirs.keys())
                raise ValueError(f"teacher and student must have the same tensors, but these differ: {changed[:3]}")
            modules = [*self.module.modules(), *self._student[0].modules()]
            counts = [(d, len(d)) for m in modules for d in (m._parameters, m._buffers, m._modules)]
            pairs = _Pairs([], [], [], [*mine.values(), *theirs.values()], counts)
            for name, slot in theirs.items():
                kind = pairs.averaged if slot.requires_grad else pairs.copied
                kind = pairs.shared if any(_within(name, prefix) for prefix in self.skip) else kind
                kind.append((mine[name].tensor, slot.tensor))
            self._found = pairs
        return self._found

    def _share(self, pairs: _Pairs, only_equal: bool = False) -> None:
        """Let parameters of ``skip`` be the student's memory: at first, and after a move or a load took them apart."""
        for mine, theirs in pairs.shared if self.share else []:
            alike = mine.device == theirs.device and mine.dtype == theirs.dtype
            if not alike or not (type(mine) is type(theirs) is nn.Parameter) or mine.data_ptr() == theirs.data_ptr():
                continue
            if not only_equal or torch.equal(mine, theirs):
                mine.data = theirs.data
        self._note_sharing(pairs)

    def _note_sharing(self, pairs: _Pairs) -> None:
        self._shares_all = all(local_shard(x).data_ptr() == local_shard(y).data_ptr() for x, y in pairs.shared)

    def _check_layouts(self) -> None:
        """The copy of a tensor with gaps or overlaps is contiguous, and could not be averaged with it."""
        names = {id(slot.tensor): name for name, slot in _slots(self._student[0]).items()}
        for mine, theirs in self._pairs().averaged:
            if is_plain(theirs) and layout(mine) != layout(theirs):
                found = f"shape {tuple(theirs.shape)} strides {theirs.stride()}"
                raise ValueError(f"the student's {names[id(theirs)]} must be dense, got {found}")

    def _unshare(self) -> None:
        for mine, theirs in self._pairs().shared:
            if is_plain(mine) and mine.data_ptr() == theirs.data_ptr():
                mine.data = mine.data.clone()

    def _load_from_state_dict(self, *args) -> None:
        # Loading writes in place, the teacher last: into the student's memory, were it still shared.
        self._unshare()
        self._last_update, self._follows = None, False
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse: bool = True) -> "EMATeacher":
        self._low = None
        super()._apply(lambda x: _without_loss(x, fn(x)), recurse)
        self._share(self._pairs())
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_low": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a deep copy has memory of its own for every parameter
        super().__setstate__(state)
        self._share(self._pairs(), only_equal=True)


def _share_again(teacher: EMATeacher, incompatible_keys: Any) -> None:
    teacher._share(teacher._pairs(), only_equal=True)
    teacher._refresh()


def _within(name: str, prefix: str) -> bool:
    """Whether ``prefix`` is ``name`` or a module around it: whole components, with or without the last dot."""
    return f"{name}.".startswith(f"{prefix.removesuffix('.')}.")


def _without_loss(x: Tensor, y: Tensor) -> Tensor:
    """``y``, which is ``x`` converted or moved; in float32 still where that became bfloat16 or float16."""
    if x.dtype == y.dtype or y.dtype not in (torch.bfloat16, torch.float16):
        return y
    return torch.empty_like(y, dtype=x.dtype).copy_(x)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """Every parameter and buffer by its first name, and where it is kept."""
    slots = {}
    for path, x in chain(module.named_parameters(), module.named_buffers()):
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        slots[path] = _Slot(
            owner._parameters if name in owner._parameters else owner._buffers, name, x, x.requires_grad
        )
    return slots


def _shards(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The local parts of a pair, which line up if both are sharded in the same way."""
    mine, theirs = pair
    if type(mine) is type(theirs) is nn.Parameter or (is_plain(mine) and is_plain(theirs)):
        return pair
    layouts = [None if is_plain(x) else (x.device_mesh, x.placements) for x in pair]
    if layouts[0] != layouts[1]:
        raise ValueError(f"teacher and student must be sharded alike, got {layouts[0]} and {layouts[1]}")
    return mine.to_local(), theirs.to_local()


def _copy(mine: Tensor, theirs: Tensor) -> None:
    mine, theirs = _shards((mine, theirs))
    mine.copy_(theirs)
