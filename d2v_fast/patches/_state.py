"""Objects that have methods of ours: what these keep with them, and how the objects are copied, pickled and replicated.

A bound method in an instance's ``__dict__`` would go wrong in each of these. A deep copy gets methods of its own; a
pickle has none and loads without d2v_fast; a replica of ``DataParallel`` gets its own. ``copy.copy`` cannot be told
from outside of the class: methods of a shallow copy are those of the original.
"""

import copy
import ctypes
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from d2v_fast.patches._seams import MARK, Options, PatchError, is_ours, logger

STATE = "_d2v_fast"
Function = TypeVar("Function", bound=Callable[..., None])
_functions: weakref.WeakSet = weakref.WeakSet()  # all of ours that are methods of instances
_stateful: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # id -> what has a state by its class only
_at_classes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # class -> State of calls in its instances
_told: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # class -> (method, reason) that the log has
_copies_as_upstream = False


def outside_of_graphs(function: Function) -> Function:
    """``function(owner, ...)``, which runs while a call is traced by a compiler and is no part of what is compiled.

    It is what torch.compiler.assume_constant_result does, less the import of the compiler. That takes only Python's
    constants for arguments before PyTorch 2.13, so that the owner is given by its address; it is alive while a call of
    its method is traced.
    """

    def by_address(address: int, *args: Any) -> None:
        function(ctypes.cast(address, ctypes.py_object).value, *args)

    by_address._dynamo_marked_constant = True

    @functools.wraps(function)
    def outside(owner: Any, *args: Any) -> None:
        if torch.compiler.is_compiling():
            by_address(id(owner), *args)
        else:
            function(owner, *args)

    return outside


class State:
    """What our methods keep with the object they belong to. A copy of the object starts with an empty one."""

    def __init__(self, owner: Any = None) -> None:
        self.cache: dict[str, Any] = {}  # built at the first call: plans, modules of ours around their parameters
        self.fallbacks: Counter[tuple[str, str]] = Counter()  # (method, reason) -> calls left to the original
        self.partial: Counter[tuple[str, str]] = Counter()  # those among them of which ours computed the rest
        self.patches: weakref.WeakSet = weakref.WeakSet()  # those that have methods in the owner's __dict__
        self._owner = None if owner is None else weakref.ref(owner)

    def belongs_to(self, owner: Any) -> bool:
        """Whether it was made for ``owner``, and not for what that is a shallow copy or replica of."""
        return self._owner is not None and self._owner() is owner

    def __deepcopy__(self, memo: dict) -> "State | None":
        owner = None if self._owner is None else self._owner()
        copied = memo.get(id(owner))
        if copied is None:
            return None
        _register(copied)
        return State(copied)

    def __reduce__(self) -> tuple:
        return type(None), ()  # no name of ours in a pickle


def state_of(owner: Any) -> State:
    """What our methods keep with ``owner``; made at the first call where they are in its class."""
    found = owner.__dict__.get(STATE)
    if not isinstance(found, State) or not found.belongs_to(owner):
        _register(owner)
        found = owner.__dict__[STATE] = State(owner)
    return found


@outside_of_graphs
def _register(owner: Any) -> None:
    _stateful[id(owner)] = owner


def fall_back(owner: Any, method: str, reason: str, options: Options, *, whole: bool = True) -> None:
    """Note that this call goes to the original ``method``; the first time for a reason, say so.

    Where a compiler traces the call, it is noted once a trace.

    Args:
        whole: False where ours computes the rest of the call; a whole call is noted once.

    Raises:
        PatchError: with ``strict=True``.
    """
    if options.strict:
        how = "run" if whole else "run in part"
        raise PatchError(f"strict=True: {type(owner).__name__}.{method} would {how} as upstream wrote it: {reason}")
    note(owner, method, reason, whole)


@outside_of_graphs
def note(owner: Any, method: str, reason: str, whole: bool = True) -> None:
    """As :func:`fall_back`, where upstream's code is the better one."""
    kind, key = type(owner), (method, reason)
    states = [state_of(owner)]
    if not is_ours(owner.__dict__.get(method)):
        states.append(_at_classes.setdefault(kind, State()))
    for state in states:
        state.fallbacks[key] += 1
        if not whole:
            state.partial[key] += 1
    told = _told.setdefault(kind, set())
    if key not in told:
        told.add(key)
        runs = "runs" if whole else "runs in part"
        logger.warning("%s.%s %s as upstream wrote it: %s", kind.__name__, method, runs, reason)


def states_at(classes: tuple[type, ...]) -> list[tuple[type, State]]:
    """What methods in these classes left to the original, by the class of the instance."""
    return [(kind, state) for kind, state in list(_at_classes.items()) if issubclass(kind, classes)]


def forget(classes: tuple[type, ...]) -> None:
    """Drop the states of instances that these classes gave one, unless a method of ours is left in them."""
    for owner in list(_stateful.values()):
        if isinstance(owner, classes):
            clear(owner)
    for kind in list(_at_classes):
        if issubclass(kind, classes) and not has_ours(kind):
            del _at_classes[kind]


def tell_again(kind: type) -> None:
    """Log the next fallback in instances of ``kind`` even if the same was logged before."""
    for told in list(_told):
        if issubclass(told, kind):
            del _told[told]


def has_ours(kind: type) -> bool:
    """Whether instances of ``kind`` have a method of ours by their class."""
    return any(is_ours(value) for base in kind.__mro__ for value in vars(base).values())


def put(owner: Any, ours: Callable, attribute: str, static: bool) -> None:
    """Make ``ours`` a method of an instance."""
    inside = owner.__dict__
    if not isinstance(inside.get(STATE), State):
        inside[STATE] = State(owner)
    _functions.add(ours)
    inside[attribute] = ours if static else MethodType(ours, owner)
    inside.update((name, MethodType(function, owner)) for name, function in _plumbing(owner).items())


def foreign_plumbing(owner: Any) -> str | None:
    """The name of a method in an instance's ``__dict__`` that somebody put where ours would have to be."""
    inside = owner.__dict__
    for name, function in _plumbing(owner).items():
        if name in inside and getattr(inside[name], "__func__", None) is not function:
            return name
    return None


def take_off(owner: Any, functions: set[Callable]) -> None:
    """Remove these methods of ours from an instance, and all that came with them if they are the last."""
    inside = owner.__dict__
    for name in [name for name, value in inside.items() if _exactly_ours(value)]:
        if getattr(inside[name], "__func__", inside[name]) in functions:
            del inside[name]
    clear(owner)


def clear(owner: Any) -> None:
    """Remove state and plumbing from an instance that has no method of ours any more."""
    inside = owner.__dict__
    if not any(map(_exactly_ours, inside.values())):
        for name, function in _plumbing(owner).items():
            if getattr(inside.get(name), "__func__", None) is function:
                del inside[name]
        if has_ours(type(owner)):
            _register(owner)
        else:
            inside.pop(STATE, None)


def _exactly_ours(value: Any) -> bool:
    """Whether this is a method that :func:`put` put there; what others wrapped around one is not."""
    function = getattr(value, "__func__", value)
    return is_ours(function) and function in _functions


class _Upstream:
    """An object as its authors made it, for as long as the block runs."""

    def __init__(self, owner: Any) -> None:
        inside = owner.__dict__
        self.inside = inside
        self.methods = {name: value for name, value in inside.items() if _exactly_ours(value)}
        names = (*self.methods, *_plumbing(owner), STATE)
        self._ours = {name: inside[name] for name in names if name in inside}

    def __enter__(self) -> "_Upstream":
        for name in self._ours:
            del self.inside[name]
        return self

    def __exit__(self, *exc: object) -> None:
        self.inside.update(self._ours)

    def put_into(self, other: Any) -> State:
        """The same methods for another instance of the class."""
        for name, value in self.methods.items():
            put(other, getattr(value, "__func__", value), name, static=not isinstance(value, MethodType))
        return other.__dict__[STATE]


@contextmanager
def copies_as_upstream() -> Iterator[None]:
    """Deep copies that are made inside have no methods of ours."""
    global _copies_as_upstream
    before, _copies_as_upstream = _copies_as_upstream, True
    try:
        yield
    finally:
        _copies_as_upstream = before


def _deepcopy(self: Any, memo: dict) -> Any:
    state = state_of(self)
    with _Upstream(self) as upstream:
        copied = copy.deepcopy(self, memo)
    if _copies_as_upstream or not upstream.methods:
        return copied
    patches = upstream.put_into(copied).patches
    for patch in state.patches:
        patches.add(patch)
        patch.own(copied)
    for method in upstream.methods.values():
        getattr(getattr(method, "__func__", method), MARK).prepare(copied)
    return copied


def _reduce_ex(self: Any, protocol: int) -> Any:
    with _Upstream(self) as upstream:
        found = self.__reduce_ex__(protocol)
        if not isinstance(found, tuple) or len(found) < 3:
            return found
        state = found[2]
        if state is upstream.inside:
            state = dict(state)
        elif isinstance(state, tuple) and state and state[0] is upstream.inside:  # with __slots__
            state = (dict(state[0]), *state[1:])
        return (*found[:2], state, *found[3:])


def _replicate(self: nn.Module) -> nn.Module:
    state = state_of(self)
    with _Upstream(self) as upstream:
        replica = self._replicate_for_data_parallel()
    if not upstream.methods:  # somebody wrapped ours: it is his wrapper that replicas get
        return replica
    own = upstream.put_into(replica)
    own.patches, own.fallbacks, own.partial = state.patches, state.fallbacks, state.partial
    return replica


_PLUMBING = {"__deepcopy__": _deepcopy, "__reduce_ex__": _reduce_ex}
_MODULE_PLUMBING = {**_PLUMBING, "_replicate_for_data_parallel": _replicate}


def _plumbing(owner: Any) -> dict[str, Callable]:
    """How an owner is copied, pickled and replicated, which goes into its ``__dict__`` as well."""
    return _MODULE_PLUMBING if isinstance(owner, nn.Module) else _PLUMBING
