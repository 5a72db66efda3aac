"""How the tensors of another format become ours and back, and the report of what happened to each."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec, Data2VecConfig

STUDENT, TEACHER, HEAD, MASK = "", "teacher", "head", "mask embedding"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# a model has at most so many elements: teacher, head and tables of indices may be no part of the file
MAX_GROWTH, ALWAYS_FINE = 4, 2**24


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and where another format keeps it."""

    ours: str
    theirs: tuple[str, ...]  # more than one: equal parts of ours along its first axis
    group: str = STUDENT  # the tensors of a group other than the student's may be absent, all of them together
    lead: int = 0  # axes of size 1 that theirs has in front

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Theirs to ours."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return whole.reshape(whole.shape[self.lead :])

    def split(self, x: Tensor) -> list[Tensor]:
        """Ours to theirs, each contiguous and with memory of its own."""
        return [part.reshape((1,) * self.lead + part.shape).clone() for part in x.detach().chunk(len(self.theirs))]

    def part_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape that each of theirs has if ours has ``shape``."""
        return (1,) * self.lead + (shape[0] // len(self.theirs), *shape[1:])


def pairs(
    ours: str,
    theirs: str,
    names: Mapping[str, tuple[str, ...]],
    group: str = STUDENT,
    kinds: tuple[str, ...] = ("weight", "bias"),
) -> list[Rule]:
    """Rules for the weights and biases of modules: our name within ``ours`` -> theirs within ``theirs``."""
    return [
        Rule(f"{ours}{mine}.{kind}", tuple(f"{theirs}{their}.{kind}" for their in parts), group)
        for mine, parts in names.items()
        for kind in kinds
    ]


@dataclass
class Report:
    """What a conversion did with every tensor, and what of the settings it could not keep."""

    format: str  # and modality, e.g. "fairseq speech"
    mapped: list[Rule] = field(default_factory=list)
    initialised: dict[str, str] = field(default_factory=dict)  # our tensors that the file lacks, and their values
    dropped: list[str] = field(default_factory=list)  # tensors that the other side has no place for
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines to print; weight and bias of a module, and modules that differ in a layer's number, share a line.

        So does all of the teacher that was initialised or dropped.
        """
        mapped = _collapsed(f"{_module(rule.ours)}\t{_braces(rule.theirs)}" for rule in self.mapped)
        width = max((line.index("\t") for line in mapped), default=0)
        lines = []
        for line, count in mapped.items():
            ours, theirs = line.split("\t")
            lines.append(f"{count:6} x  {ours:{width}}  {theirs}")
        created = _collapsed(f"{_part(name)} ({how})" for name, how in self.initialised.items())
        for title, group in (("initialised", created), ("dropped", _collapsed(map(_part, self.dropped)))):
            lines += [f"{count:6} x  {title}: {line}" for line, count in group.items()]
        return "\n".join([f"{self.format}:", *lines, *(f"  note: {note}" for note in self.notes)])


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _part(name: str) -> str:
    return "teacher" if name.startswith("teacher.") else _module(name)


def _collapsed(lines: Iterable[str]) -> dict[str, int]:
    """Lines with the first number of each name replaced by ``*``, and how often each occurs."""
    counts: dict[str, int] = {}
    for line in lines:
        line = re.sub(r"([^\s\d]*\.)\d+(\S*)", r"\1*\2", line)
        counts[line] = counts.get(line, 0) + 1
    return counts


def _braces(names: tuple[str, ...]) -> str:
    """``a.{q,k,v}_proj`` for three names that differ in their middle."""
    names = tuple(map(_module, names))
    if len(names) == 1:
        return names[0]
    start = _common(names)
    end = _common([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"


def _common(names: Sequence[str]) -> str:
    """The longest beginning that all ``names`` have."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


@dataclass
class Loaded:
    """A model read from a file of another format, and the report of it."""

    model: Data2Vec
    report: Report


def outline(path: str | Path, config: Data2VecConfig) -> Data2Vec:
    """A model whose tensors have names and shapes, but no memory."""
    with torch.device("meta"):
        return make_model(path, config)


def make_model(path: str | Path, config: Data2VecConfig) -> Data2Vec:
    """A fresh model.

    Raises:
        CheckpointError: a configuration that no model can have, with sizes for instance that no tensor can have.
    """
    try:
        return Data2Vec(config)
    except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a configuration that no model can have: {error}") from None


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Layers among tensor ``names``: the different numbers that ``pattern`` matches as its group 1."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def check_counts(path: str | Path, config: Data2VecConfig, tensors: Mapping[str, Tensor], pattern: str) -> None:
    """Refuse a configuration of more or fewer parts than there are tensors for, before anything of its size is made.

    Raises:
        CheckpointError: another number of layers than names that match ``pattern``, as in :func:`count_layers`.
    """
    encoder, found = config.encoder, count_layers(tensors, pattern)
    problems = [] if found == encoder.layers else [f"{found} layers, the configuration says {encoder.layers}"]
    for name, count in (("position convolutions", encoder.pos_conv_depth), ("layers of the head", config.head_layers)):
        if count > len(tensors):
            problems.append(f"{len(tensors)} tensors, the configuration says {count} {name}")
    require(path, "the tensors do not fit the configuration", problems)


def distinct(path: str | Path, named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The values by their names, which renaming may have made equal.

    Raises:
        CheckpointError: two values have the same name.
    """
    found: dict[str, Any] = {}
    for name, value in named:
        if name in found:
            raise CheckpointError(f"{path}: two tensors become {name}")
        found[name] = value
    return found


def require(path: str | Path, what: str, problems: Sequence[str]) -> None:
    """Raise CheckpointError with all ``problems`` if there are any."""
    if problems:
        raise CheckpointError(f"{path}: {what}: {'; '.join(problems)}")


def gather(
    path: str | Path,
    report: Report,
    config: Data2VecConfig,
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    drop: str,  # a pattern
) -> dict[str, Tensor]:
    """Our state from ``tensors`` by their names; fills the report. Names that ``drop`` matches are left out.

    NaN and infinities are weights like others: a run that has diverged can be looked at.

    Raises:
        CheckpointError: missing or unexpected names, other shapes, dtypes or layouts, or no tensors at all; all are
            listed. Or a model of many times the memory that ``tensors`` have, which are views of little then.
    """
    model = outline(path, config)
    expected = {name: x.shape for name, x in model.state_dict().items()}
    used = {name for rule in rules for name in rule.theirs}
    absent = {
        group
        for group in {rule.group for rule in rules} - {STUDENT}
        if not any(name in tensors for rule in rules if rule.group == group for name in rule.theirs)
    }
    problems: list[str] = []
    chosen: dict[str, list[Tensor]] = {}
    for rule in rules:
        if rule.group in absent:
            continue
        missing = [name for name in rule.theirs if name not in tensors]
        problems += [f"{name} is missing" for name in missing]
        if missing:
            continue
        parts, shape = [tensors[name] for name in rule.theirs], rule.part_shape(expected[rule.ours])
        wrong = [_wrong(name, x, shape) for name, x in zip(rule.theirs, parts, strict=True)]
        problems += [message for message in wrong if message]
        if not any(wrong):
            chosen[rule.ours] = parts
            report.mapped.append(rule)
    for name in sorted(tensors.keys() - used):
        if re.match(drop, name):
            report.dropped.append(name)
        else:
            problems.append(f"{name} is unexpected")
    if not problems:
        problems = _too_large(model, chain.from_iterable(chosen.values()))
    require(path, "the tensors do not fit the configuration", problems)
    return {rule.ours: rule.merge(chosen[rule.ours]) for rule in rules if rule.ours in chosen}


def _too_large(model: Data2Vec, parts: Iterable[Tensor]) -> list[str]:
    """A problem if tensors that share memory would become a model of far more."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.itemsize for x in parts}
    held = sum(storages.values())
    wanted = sum(x.numel() for x in chain(model.parameters(), model.buffers()))
    if wanted <= MAX_GROWTH * held + ALWAYS_FINE:
        return []
    return [f"a model of {wanted} elements from tensors that have {held} together"]


def _wrong(name: str, x: Any, shape: tuple[int, ...]) -> str:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        found = x.dtype if isinstance(x, Tensor) else getattr(x, "name", type(x).__name__)
        return f"{name} must be a tensor of floating-point numbers of 16, 32 or 64 bits, got {found}"
    if x.layout != torch.strided or x.device.type != "cpu":
        return f"{name} must be dense and have memory, got layout {x.layout} on device {x.device}"
    if tuple(x.shape) != shape:
        return f"{name} must have shape {shape}, got {tuple(x.shape)}"
    return ""


def build(
    path: str | Path, config: Data2VecConfig, state: dict[str, Tensor], report: Report, dtype: torch.dtype | None
) -> Loaded:
    """A model with ``state``, what is missing initialised afresh (the teacher's: the student's values), in eval mode.

    ``dtype`` is the student's, None that of the file; the teacher is float32 in any case.
    """
    model = make_model(path, config)
    student = [x.dtype for name, x in state.items() if not name.startswith("teacher.")]
    for kind in student[1:]:
        student[0] = torch.promote_types(student[0], kind)
    model.to(student[0] if dtype is None else dtype)
    full = {}
    for name, fresh in model.state_dict().items():
        source = name.removeprefix("teacher.module.")
        if name in state:
            full[name] = state[name]
        elif source != name:  # the student's come first
            full[name] = full[source]
            report.initialised[name] = "the student's"
        else:
            full[name] = fresh
            report.initialised[name] = "random"
    model.load_state_dict(full)
    return Loaded(model.eval(), report)


def scatter(rules: Sequence[Rule], model: Data2Vec, report: Report) -> dict[str, Tensor]:
    """The model's tensors by their names, on the CPU; fills the report with what the format has no place for."""
    state = model.state_dict()
    tensors = {}
    for rule in rules:
        tensors |= zip(rule.theirs, rule.split(state[rule.ours].cpu()), strict=True)
        report.mapped.append(rule)
    report.dropped += sorted(state.keys() - {rule.ours for rule in rules})
    return tensors
