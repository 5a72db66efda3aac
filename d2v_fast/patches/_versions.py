"""Which releases of the frameworks the drop-in is tested with, and which are installed."""

import importlib.metadata
from dataclasses import dataclass

from d2v_fast.patches import _rules
from d2v_fast.patches._seams import disabled


@dataclass(frozen=True)
class Framework:
    """A framework, the names its distribution may have, and the release that the tests run with."""

    name: str
    distributions: tuple[str, ...]
    tested: str


FRAMEWORKS = (
    Framework("fairseq", ("ve-fairseq", "fairseq"), "0.12.3"),
    Framework("transformers", ("transformers",), "5.23.0"),
    Framework("timm", ("timm",), "1.0.31"),
)


def report() -> list[str]:
    """For :func:`d2v_fast.info`: whether the drop-in is on, what it finds here, and what its sizes are known from."""
    lines = ["off: D2V_FAST_DISABLE=1" if disabled() else "on (D2V_FAST_DISABLE=1 turns it off)"]
    lines += [f"{framework.name} {_found(framework)}" for framework in FRAMEWORKS]
    return [*lines, _rules.describe()]


def _found(framework: Framework) -> str:
    for name in framework.distributions:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version == framework.tested:
            return f"{version}: supported, tested with this release"
        return f"{version}: tested with {framework.tested}; methods with another source are left, and reported"
    return f"not installed (tested with {framework.tested})"
