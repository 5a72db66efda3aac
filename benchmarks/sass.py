"""What a compiled kernel looks like to the machine: registers, spills, and how it reaches memory."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),.*$", flags=re.MULTILINE)
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def tools_installed() -> bool:
    """Whether Triton came with NVIDIA's assembler and disassembler."""
    return all((TOOLS / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm"))


@dataclass(frozen=True)
class Section:
    """A straight piece of machine code: a loop body, or a whole kernel."""

    instructions: int
    loads: dict[int, int]  # width in bits -> number of LDG, asynchronous ones (LDGSTS) included
    stores: dict[int, int]  # width in bits -> number of STG

    @property
    def bytes(self) -> int:
        """Bytes that one thread moves to and from global memory in one pass."""
        return sum(bits // 8 * n for widths in (self.loads, self.stores) for bits, n in widths.items())

    @property
    def wide(self) -> int:
        return self.loads.get(128, 0) + self.stores.get(128, 0)


@dataclass(frozen=True)
class MachineCode:
    """Resources of a kernel; ``loops`` are its innermost loops that touch global memory."""

    registers: int
    spills: int  # LDL and STL instructions
    shared: int  # bytes
    whole: Section
    loops: list[Section]

    @property
    def main(self) -> Section:
        """The shortest loop with 128-bit accesses (rare cases have longer ones), else the longest, else everything."""
        if not self.loops:
            return self.whole
        wide = [loop for loop in self.loops if loop.wide]
        return min(wide, key=lambda x: x.instructions) if wide else max(self.loops, key=lambda x: x.instructions)


def inspect(kernel: CompiledKernel) -> MachineCode:
    """Disassemble ``kernel``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code, labels = _parse(disassemble(Path(file.name)))
    names = [name for name, _ in code]
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        shared=kernel.metadata.shared,
        whole=_section(names),
        loops=[_section(names[start:end]) for start, end in _innermost_loops(code, labels)],
    )


def tool(name: str, *arguments: str | Path) -> str:
    """What one of NVIDIA's tools prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: Path) -> str:
    """The machine code of all kernels in ``cubin``."""
    return tool("nvdisasm", "-c", "-ndf", cubin)  # no data flow: a third faster


def functions(cubin: Path) -> dict[str, tuple[list[str], list[tuple[int, int]]]]:
    """Of every kernel in ``cubin``, by its mangled name: the instructions, and the first and last + 1 of each loop."""
    parts = _SECTION.split(disassemble(cubin))
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        code, labels = _parse(text)
        found[name] = [instruction for instruction, _ in code], sorted(_loops(code, labels))
    return found


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    code, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.search(line)) and found[1] != "NOP":
            code.append((found[1], found[2]))
    return code, labels


def _loops(code: list[tuple[str, str]], labels: dict[str, int]) -> set[tuple[int, int]]:
    spans = set()
    for i, (name, operands) in enumerate(code):
        target = _TARGET.search(operands)
        if name.startswith("BRA") and target and labels[target[1]] <= i:
            spans.add((labels[target[1]], i + 1))
    return spans


def _innermost_loops(code: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    touching = [
        span for span in _loops(code, labels) if any(name.startswith(("LDG", "STG")) for name, _ in code[slice(*span)])
    ]
    return sorted(a for a in touching if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in touching))


def _section(names: list[str]) -> Section:
    return Section(len(names), _widths(names, "LDG", "LDGSTS"), _widths(names, "STG"))


def _widths(names: list[str], *kinds: str) -> dict[int, int]:
    found = Counter(
        next((_BITS[part] for part in name.split(".") if part in _BITS), 32)
        for name in names
        if name.partition(".")[0] in kinds
    )
    return dict(sorted(found.items(), reverse=True))
