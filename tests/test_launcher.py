"""``d2v-fast run``: the command is itself, and every Python below it has the hook. In processes of their own."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

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
        (["--no-such"], "--no-such is no option of d2v-fast run"),
    ):
        with pytest.raises(UserError, match=message):
            launch.resolve(command)


def test_environment_is_added_to_once():
    one = launch.child_environment({"PYTHONPATH": f"a{os.pathsep}b", "X": "1"})
    assert one == {"PYTHONPATH": os.pathsep.join([FOLDER, "a", "b"]), "X": "1", "D2V_FAST_REPORT": str(os.getpid())}
    assert launch.child_environment(one) == one
    assert launch.child_environment({})["PYTHONPATH"] == FOLDER


def test_switches_go_into_the_environment():
    """Those that were given; others stay as they were."""
    inherited = {"D2V_FAST_WITHOUT": "conv", "D2V_FAST_STRICT": "1"}
    found = launch.child_environment(inherited, "encoder, masks")
    assert (found["D2V_FAST_WITHOUT"], found["D2V_FAST_STRICT"]) == ("encoder,masks", "1")
    assert launch.child_environment(inherited)["D2V_FAST_WITHOUT"] == "conv"
    assert launch.child_environment({}, None, True)["D2V_FAST_STRICT"] == "1"
    for environment, without, message in (
        ({}, "loss,strict", r"--without: 'strict' is no switch.*; switches are ema, loss, .*metrics$"),
        ({"D2V_FAST_WITHOUT": "EMA"}, None, r"D2V_FAST_WITHOUT: 'EMA' is no switch \(nearest: ema\); switches are"),
        ({"D2V_FAST_STRICT": "true"}, None, "D2V_FAST_STRICT must be 1 or 0, got 'true'"),
    ):
        with pytest.raises(UserError, match=message):
            launch.child_environment(environment, without)


def test_switches_of_the_command_line(script):
    path = script("""
        import sys, torch
        options = sys.modules["d2v_fast.auto"].handle.options
        print(sys.argv[1:], len(options.parts), sorted({"ema", "encoder", "masks"} - options.parts), options.strict)
    """)
    theirs = ("--strict", "--without", "ema")
    found = "['--strict', '--without', 'ema']"
    assert run(path, *theirs)[0] == f"{found} 9 [] False\n"
    ours = ("--without", "encoder,loss", "--without", "masks", "--strict")
    assert run(*ours, path, *theirs)[0] == f"{found} 6 ['encoder', 'masks'] True\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-I x.py", "-I ignores PYTHONPATH"),
        ("-IB x.py", "-I ignores PYTHONPATH"),
        ("-BE -m json.tool", "-E ignores PYTHONPATH"),
        ("-Em json.tool", "-E ignores PYTHONPATH"),
        ("-X dev -W ignore -I -c pass", "-I ignores PYTHONPATH"),
        ("--check-hash-based-pycs never -S x.py", "-S imports no sitecustomize"),
        ("x.py -I", None),
        ("-m json.tool -I", None),
        ("-Bc pass -E", None),
        ("-WI -XE x.py", None),
        ("-W I x.py -E", None),
        ("-", None),
        ("", None),
    ],
)
def test_pythons_that_are_not_reached(arguments, reason):
    for python in ("/usr/bin/python3.11", "python", "python3.13t"):
        expected = None if reason is None else f"{python} {reason}"
        assert launch.unreached([python, *arguments.split()]) == expected
    assert launch.unreached(["/usr/bin/fairseq-hydra-train", *arguments.split()]) is None


def test_isolated_python_is_told(script):
    path = script("print('runs')")
    out, err = run(sys.executable, "-IB", path)
    assert out == "runs\n"
    assert err == f"d2v_fast: {sys.executable} -I ignores PYTHONPATH, so that nothing is replaced in it\n"


def test_command_line_errors(script):
    broken = Path(script("", "broken"))
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    for command, message in (
        ((), "error: COMMAND is missing"),
        (("no-such-command",), "error: COMMAND no-such-command was not found"),
        (("no.py",), "error: COMMAND no.py: there is no such file"),
        (("--wihtout", "masks", "x.py"), "error: --wihtout is no option of d2v-fast run: there are --without"),
        (("--without", "masks,encodr", "x.py"), "error: --without: 'encodr' is no switch (nearest: encoder); switches"),
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
    path = script("import sys; print(*sorted(m for m in sys.modules if m.startswith(('d2v_fast', 'torch'))))")
    out, err = run(path)
    ours = ["d2v_fast", "d2v_fast.errors", "d2v_fast.launch", "d2v_fast.launch.hooks", "d2v_fast.launch.switches"]
    assert out.split() == ours and err == ""


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


def test_disabled_wins_over_bad_switches(script):
    path = script("import torch, d2v_fast.auto; print(d2v_fast.auto.handle.disabled)")
    out, err = run(path, D2V_FAST_DISABLE="1", D2V_FAST_WITHOUT="encodr", D2V_FAST_STRICT="yes")
    assert out == "True\n" and "D2V_FAST_DISABLE=1" in err and "Traceback" not in err


def test_a_script_that_cleans_its_environment(script):
    """It prints its table as ever."""
    err = run(script("import os, torch; os.environ.clear()"))[1]
    assert err.strip() == "d2v_fast: no supported class was imported in this process (children print their own table)"


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
        (me, "1", [], True),
        (other, None, [], False),
        (other, None, ["one"], True),
        (other, "0", ["one"], True),
        (other, "1", ["one"], False),
        (other, "none", ["one"], True),
    ):
        monkeypatch.setattr(auto, "_reporter", command)
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(auto.handle, "patches", patches)
        auto._print_report()
        assert capsys.readouterr().err == ("the table\n" if expected else ""), (command, rank, patches)


TIMM = """
class ModelEmaV2:
    device = None

    def __init__(self, module):
        self.module = module

    def _update(self, model, update_fn):
        raise AssertionError("this is not ours")
"""
TRAINING = """
import sys
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

def call_ours():
    from timm.utils.model_ema import ModelEmaV2
    ModelEmaV2(torch.nn.Linear(2, 2))._update(torch.nn.Linear(2, 2), lambda e, m: 0.5 * e + 0.5 * m)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        call_ours()
        return i

def rank(index, calls):
    import timm.utils.model_ema
    list(DataLoader(Data(), num_workers=1))
    if calls:
        call_ours()

if __name__ == "__main__":
    call_ours()
    list(DataLoader(Data(), num_workers=1))
    mp.start_processes(rank, (False,), start_method="fork")
    mp.start_processes(rank, (True,), nprocs=2, start_method=sys.argv[1])
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_first_rank_of_spawn_prints_its_table(script, tmp_path, method):
    """Once, though workers of data loaders and ranks that never call ours are processes of the same kind."""
    (tmp_path / "timm/utils").mkdir(parents=True)
    (tmp_path / "timm/utils/model_ema.py").write_text(TIMM)
    out, err = run(script(TRAINING), method)
    tables = [line for line in err.splitlines() if not line.startswith("INFO")]
    does = "all averages in one pass; integer buffers are copied, not averaged"
    rows = [
        "d2v_fast: 1 replaced, 0 left as they were",
        f"  replaced    1 x ModelEmaV2._update  ema        {does}  ",
    ]
    calls = "1 call" if method == "spawn" else "2 calls"  # and that of the process it was forked from
    command = [rows[0], f"{rows[1]}1 call"]
    assert tables == [rows[0], rows[1] + calls, *command], err
    assert out == ""


def test_who_is_first(monkeypatch):
    """A child of which nothing else is known, and that which has the number 0 wherever a number is known."""
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    auto = importlib.import_module("d2v_fast.auto")
    monkeypatch.delitem(sys.modules, "d2v_fast.auto")
    monkeypatch.delenv("RANK", raising=False)
    assert auto._rank() == 0
    process = multiprocessing.Process(
        target=importlib.import_module("torch.multiprocessing.spawn")._wrap, args=(print, 3, (), "errors")
    )
    monkeypatch.setattr(multiprocessing, "current_process", lambda: process)
    assert auto._rank() == 3
    for no_number in ("", "none", "-1"):
        monkeypatch.setenv("RANK", no_number)
        assert auto._rank() == 3
    monkeypatch.setenv("RANK", "2")
    assert auto._rank() == 2
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert auto._rank() == 1


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
