"""Where scenarios are played: runs on several ranks by server.py, and what has to hold of what they leave."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from text_runs import overrides, write_text

from d2v_fast.train import checkpoint
from d2v_fast.train.logging import read_metrics

HERE = Path(__file__).parent
UPDATES, EVERY = 8, 3  # checkpoints after 3, 6 and 8
TIMEOUT = 6  # seconds, distributed.timeout
LONGEST = 60  # seconds until a command is killed, and the scenario has failed
SETTINGS = {
    "updates": UPDATES,
    "checkpoint_every": EVERY,
    "log_every": 1,
    "log.tensorboard": False,
    "distributed.timeout": TIMEOUT,
}


@dataclass
class Rank:
    """How the command of a rank ended."""

    code: int
    seconds: float
    late: bool
    left: bool
    out: str
    err: str


class Server:
    """server.py, as a process of its own."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    def run(self, request: dict) -> list[Rank]:
        """One command on its ranks."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Rank(**values) for values in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Stage:
    """Text, the weights of uninterrupted runs on it, and a folder for each scenario."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder, self._runs = server, folder, 0
        self._wanted: dict[str, dict[str, torch.Tensor]] = {}
        self.text = write_text(folder / "text")
        self.longest = 0.0  # seconds of a command that met a fault

    def new(self) -> Path:
        """A folder for a run, not made yet."""
        self._runs += 1
        return self._folder / f"run-{self._runs}"

    def arguments(self, out: Path, **changes) -> list[str]:
        """Of the command; ``changes`` with __ for a dot."""
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return overrides(self.text, out, *(f"{key}={value}" for key, value in (SETTINGS | changed).items()))

    def run(self, out: Path, *plants: dict, ranks: int = 2, of_rank: dict | None = None, **changes) -> list[Rank]:
        """The command on ``ranks`` processes; none of them outlives its time, or leaves a process behind."""
        request = {
            "arguments": self.arguments(out, **changes),
            "ranks": ranks,
            "of_rank": of_rank or {},
            "plants": list(plants),
            "seconds": LONGEST,
        }
        results = self._server.run(request)
        shown = [(r.code, round(r.seconds, 1), r.err[-1500:]) for r in results]
        assert not any(r.late or r.left for r in results), shown
        if plants:
            self.longest = max(self.longest, *(r.seconds for r in results))
        return results

    def wanted(self, mode: str = "ddp") -> dict[str, torch.Tensor]:
        """Weights of an uninterrupted run on two ranks."""
        if mode not in self._wanted:
            out = self._folder / f"whole-{mode}"
            expect(self.run(out, distributed__mode=mode), 0, 0)
            self._wanted[mode] = weights(out)
        return self._wanted[mode]

    def continues(self, out: Path, start: int, mode: str = "ddp", **changes) -> list[Rank]:
        """The same command again goes on from update ``start`` to the weights of an uninterrupted run, bit for bit."""
        results = self.run(out, distributed__mode=mode, **changes)
        expect(results, 0, 0)
        said = f"continuing from {checkpoint.checkpoint_path(out, start)} (update {start})"
        assert (said in results[0].err) == (start > 0), results[0].err
        found, wanted = weights(out), self.wanted(mode)
        assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())
        assert [row["update"] for row in read_metrics(out)] == list(range(1, UPDATES + 1))
        assert not list(out.glob(".*.tmp")), list(out.iterdir())
        return results


def weights(out: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.checkpoints(out)[-1]
    assert path == checkpoint.checkpoint_path(out, UPDATES)
    return checkpoint.read(path)["model"]


def saved(out: Path) -> list[int]:
    """Updates of the checkpoints that are there, all of them whole."""
    found = checkpoint.checkpoints(out)
    for path in found:
        checkpoint.read(path)
    return [int(path.name.removeprefix("checkpoint-")) for path in found]


def first(out: Path) -> str:
    """Of the checkpoints."""
    return str(checkpoint.checkpoint_path(out, EVERY))


def expect(results: list[Rank], *codes: int | tuple[int, ...]) -> None:
    """Exit codes, of which some ranks may have one of several."""
    shown = [(r.code, round(r.seconds, 1), r.err[-3000:]) for r in results]
    for result, code in zip(results, codes, strict=True):
        assert result.code in (code if isinstance(code, tuple) else (code,)), shown


def says(result: Rank, *parts: str) -> None:
    """Without a traceback: in words."""
    assert all(part in result.err for part in parts), (parts, result.err[-3000:])
    assert "Traceback" not in result.err, result.err[-6000:]


def on(rank: int | None, name: str, **values) -> dict:
    return {"rank": rank, "name": name, **values}
