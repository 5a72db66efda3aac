"""``d2v-fast run``: the command is itself, and every Python below it has the hook. In processes of their own."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from d2v_fast import launch
from d2v_fast.errors import UserError

RUN = [str(Path(sys.executable).with_name("d2v-fast")), "run"]
FOLDER = str(launch.FOLDER)
HOOKED = "any(type(f).__name__ == 'AfterImport' for f in sys.meta_path)"


@pytest.fixture
def script(tmp_path):
    def write(code: str, name: str = "script.py") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(code))
        return str(path)

    return write


def start(*command: str, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "D2V_FAST_DISABLE", "D2V_FAST_REPORT")}
    environment = {**clean, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*RUN, *command], env=environment, text=True, **pipes)


def run(*command: str, send: str = "", expect: int = 0, **environment: str) -> tuple[str, str]:
    with start(*command, **environment) as process:
        out, err = process.communicate(send)
    assert process.returncode == expect, err
    return out, err


def test_resolve(script, monkeypatch, tmp_path):
    path = script("")
    assert launch.resolve([path, "a"]) == [sys.executable, path, "a"]
    assert launch.resolve(["-m", "json.tool", "-h"]) == [sys.executable, "-m", "json.tool", "-h"]
    assert launch.resolve(["pytest", "x"]) == [str(Path(sys.executable).with_name("pytest")), "x"]
    own = tmp_path / "own-command"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.resolve(["own-command"]) == [str(own)]
    for command, message in (
        ([], "COMMAND is missing"),
        (["-m"], "COMMAND is missing"),
        (["no-such-command"], "no-such-command was not found"),
        (["no_such_script.py"], "no_such_script.py: there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            launch.resolve(command)


def test_environment_is_added_to_once():
    one = launch.child_environment({"PYTHONPATH": f"a{os.pathsep}b", "X": "1"})
    assert one == {"PYTHONPATH": os.pathsep.join([FOLDER, "a", "b"]), "X": "1", "D2V_FAST_REPORT": str(os.getpid())}
    assert launch.child_environment(one) == one
    assert launch.child_environment({})["PYTHONPATH"] == FOLDER


def test_command_line_errors(script):
    broken = Path(script("", "broken"))
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    for command, message in (
        ((), "error: COMMAND is missing"),
        (("no-such-command",), "error: COMMAND no-such-command was not found"),
        (("no.py",), "error: COMMAND no.py: there is no such file"),
        ((str(broken),), f"error: COMMAND {broken} cannot be executed"),
    ):
        out, err = run(*command, expect=1)
        assert out == "" and err.startswith(message) and "Traceback" not in err


def test_the_command_is_itself(script):
    path = script("""
        import sys, torch
        print(sys.argv[1:], sys.stdin.read(), "d2v_fast.auto" in sys.modules)
        print(sys.modules["sitecustomize"].__file__ in sys.path, any("launch" in p for p in sys.path))
        sys.exit(7)
    """)
    out, err = run(path, "--help", "-x", "lr=[0.1]", send="from stdin", expect=7)
    assert out.splitlines() == ["['--help', '-x', 'lr=[0.1]'] from stdin True", "False False"]
    assert err.strip() == "d2v_fast: no supported class was imported in this process (children print their own table)"


def test_without_torch_nothing_is_imported(script):
    path = script("import sys; print(sorted(m for m in sys.modules if m.startswith(('d2v_fast', 'torch'))))")
    out, err = run(path)
    assert out.strip() == "['d2v_fast', 'd2v_fast.errors', 'd2v_fast.launch', 'd2v_fast.launch.hooks']" and err == ""


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_signals_arrive(script, name):
    path = script("""
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
        print("ready", flush=True)
        time.sleep(60)
    """)
    with start(path) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(name)
        process.communicate()
    assert process.returncode == -name


def test_own_sitecustomize_runs(script, tmp_path):
    script("import sys; sys.modules['sys'].mine = 'kept'", "sitecustomize.py")
    path = script(f"import sys; print(sys.mine, {HOOKED})")
    assert run(path, PYTHONPATH=str(tmp_path)) == ("kept True\n", "")


def test_own_sitecustomize_fails(script, tmp_path):
    script("raise OSError('theirs')", "sitecustomize.py")
    path = script(f"import sys; print({HOOKED})")
    out, err = run(path, PYTHONPATH=str(tmp_path))
    assert out == "True\n" and "OSError: theirs" in err


def test_disabled(script):
    """What stays waits for transformers, so that its models can still be loaded with our name for attention."""
    path = script(f"import sys; print({HOOKED}); import torch; print({HOOKED})")
    out, err = run(path, D2V_FAST_DISABLE="1")
    assert out == "True\nTrue\n" and "D2V_FAST_DISABLE=1" in err


def test_module_that_imports_torch_first(script, tmp_path):
    """It is found before torch is there, and complete afterwards."""
    (tmp_path / "modeling_first.py").write_text("import torch\nclass Model:\n    def forward(self): return 1\n")
    path = script("""
        import importlib
        seen = []
        real = importlib.import_module
        def watched(name, *rest):
            found = real(name, *rest)
            if name == "d2v_fast.patches.all":
                found.look = lambda module: seen.append(module.__name__)
            return found
        importlib.import_module = watched
        import modeling_first
        print(seen)
    """)
    assert run(path)[0].strip() == "['torch', 'modeling_first']"


def test_child_process(script):
    path = script(f"""
        import subprocess, sys
        subprocess.run([sys.executable, "-c", "import sys; print({HOOKED})"], check=True)
    """)
    assert run(path) == ("True\n", "")


def test_who_reports(monkeypatch, capsys):
    """The command, and the first rank below a launcher such as torchrun if something was replaced there."""
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    auto = importlib.import_module("d2v_fast.auto")
    monkeypatch.delitem(sys.modules, "d2v_fast.auto")
    monkeypatch.setattr(auto, "report", lambda: "the table")
    me, other = str(os.getpid()), "1"
    for command, rank, patches, expected in (
        (me, None, [], True),
        (other, None, [], False),
        (other, None, ["one"], True),
        (other, "0", ["one"], True),
        (other, "1", ["one"], False),
    ):
        monkeypatch.setenv("D2V_FAST_REPORT", command)
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(auto.handle, "patches", patches)
        auto._print_report()
        assert capsys.readouterr().err == ("the table\n" if expected else ""), (command, rank, patches)


def test_spawned_workers(script):
    """Of ``mp.spawn``, as fairseq starts its ranks, and of a data loader."""
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    path = script("""
        import sys
        import torch
        import torch.multiprocessing as mp
        from torch.utils.data import DataLoader, Dataset

        class Hooked(Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, i):
                return int("d2v_fast.auto" in sys.modules)

        def rank(index, queue):
            import fairseq.modules.ema_module as theirs
            queue.put(hasattr(theirs.EMAModule._step_internal, "__d2v_fast__"))

        if __name__ == "__main__":
            print(list(DataLoader(Hooked(), num_workers=1, multiprocessing_context="spawn")))
            queue = mp.get_context("spawn").SimpleQueue()
            mp.spawn(rank, args=(queue,), nprocs=1)
            print(queue.get())
    """)
    out, err = run(path)
    assert out.splitlines() == ["[tensor([1])]", "True"]
    assert err.count("no supported class was imported") == 1  # one process reports, the command
