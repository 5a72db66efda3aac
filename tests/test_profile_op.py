"""Profiles of one op: ncu's command line, its table in another process's words, and what goes wrong."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import profile_op

FIXED = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
FIXED += ["Device", "CC"]
COLUMNS = [name for names in profile_op.METRICS.values() for name in names]
UNITS = dict.fromkeys(COLUMNS, "%") | {"launch__registers_per_thread": "register/thread"}
UNITS |= {name: "byte" for name in COLUMNS if "bytes" in name} | {"gpu__time_duration.sum": "ns"}
LONG = "void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int, T2)"


def quoted(cells):
    return ",".join(f'"{cell}"' for cell in cells)


def raw_page(launches, units=UNITS):
    """As ncu writes it: remarks, names, units, launches. ``launches``: names with values of the columns."""
    lines = ["==PROF== Connected to process 7 (/usr/bin/python3)", '==PROF== Profiling "x" - 0: 0%....100% - 9 passes']
    lines += [quoted(FIXED + COLUMNS), quoted([""] * len(FIXED) + [units[name] for name in COLUMNS])]
    for i, (name, values) in enumerate(launches):
        fixed = [i, 7, "python3", "127.0.0.1", name, 1, 7, "(256, 1, 1)", "(132, 1, 1)", 0, "9.0"]
        lines.append(quoted(fixed + [values.get(column, "1") for column in COLUMNS]))
    return "\n".join([*lines, "==PROF== Disconnected from process 7"]) + "\n"


TWO = [
    ("_fwd_kernel", {"gpu__time_duration.sum": "1,500", "dram__bytes_read.sum": "2,000,000", COLUMNS[3]: "80.5"}),
    (LONG, {"gpu__time_duration.sum": "100", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "n/a"}),
    ("_fwd_kernel", {"gpu__time_duration.sum": "500", "dram__bytes_read.sum": "1,000,000", COLUMNS[3]: "40.5"}),
]


def test_kernels():
    """Times and bytes of equal kernels are added, shares weighted by time, missing counters stay missing."""
    first, second = profile_op.by_kernel(profile_op.parse(raw_page(TWO)))
    assert (first.name, first.launches, first.ns, first.read_bytes) == ("_fwd_kernel", 2, 2000.0, 3e6)
    assert first.dram_percent == pytest.approx(0.75 * 80.5 + 0.25 * 40.5) and first.local_bytes == 4.0
    assert second.tensor_percent is None and second.launches == 1 and second.sm_percent == 1.0
    text = profile_op.table([first, second], 10**6)
    lines = text.splitlines()
    assert lines[1].split()[:4] == ["_fwd_kernel", "2", "2.0", "3.0"] and "–" not in lines[1] and "–" in lines[2]
    assert lines[2].startswith("at::native::vectorized_elementwise_ke... ") and len(lines[1]) == len(lines[0])
    assert "in all 3.0 MB; the least is 1.0 MB: 3.00 times that" in text


def test_units():
    page = raw_page(TWO, UNITS | {"gpu__time_duration.sum": "usecond", "dram__bytes_read.sum": "Mbyte"})
    first = profile_op.parse(page)[0]
    assert first["ns"] == 1.5e6 and first["read_bytes"] == 2e12
    with pytest.raises(profile_op.ProfileError, match="in 'fortnight', expected one of"):
        profile_op.parse(raw_page(TWO, UNITS | {"gpu__time_duration.sum": "fortnight"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", "profiled nothing: ==ERROR== ERR_NVGPU"),
        ("", "it said nothing"),
        (quoted(FIXED + COLUMNS) + "\n" + quoted(["0"] * 22), "no line of units"),
        (raw_page([]), "launched no kernel"),
    ],
)
def test_nothing_profiled(text, message):
    with pytest.raises(profile_op.ProfileError, match=message):
        profile_op.parse(text)


FAKE = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
pathlib.Path({seen!r}).write_text("\\n".join(arguments))
pathlib.Path(arguments[arguments.index("--log-file") + 1]).write_text({page!r})
sys.exit({status})
"""


def fake_ncu(tmp_path, monkeypatch, page, status=0):
    file = tmp_path / "ncu"
    file.write_text(FAKE.format(python=sys.executable, seen=str(tmp_path / "seen"), page=page, status=status))
    file.chmod(0o755)
    monkeypatch.setattr(profile_op, "program", lambda name: str(file))
    return tmp_path / "seen"


def test_command(tmp_path, monkeypatch, capsys):
    """Through a program in ncu's place: what it is given, and what is made of its table."""
    seen, out = fake_ncu(tmp_path, monkeypatch, raw_page(TWO)), tmp_path / "ema.json"
    profile_op.main(["ema", "--case", "speech large*", "--json", str(out), "--commit", "abc"])
    arguments = seen.read_text().splitlines()
    assert arguments[:5] == ["--csv", "--page", "raw", "--print-units", "base"]
    assert arguments[5:7] == ["--clock-control", "none"] and arguments[9:11] == ["--profile-from-start", "off"]
    assert arguments[12] == ",".join(COLUMNS) and arguments[13] == sys.executable
    case = next(case for case in __import__("bench_ema").BENCH.cases if case.name.startswith("speech large"))
    assert arguments[14:] == [
        str(Path(profile_op.__file__)), "ema", "--case", case.name, "--mode", "fwd", "--provider", "d2v_fast", "--inner"
    ]  # fmt: skip
    record = json.loads(out.read_text())
    assert record["kernels"][0]["launches"] == 2 and record["case"] == case.name and record["mode"] == "fwd"
    assert record["minimal_bytes"] == __import__("bench_ema").BENCH.minimal_bytes(case, "fwd")
    assert "_fwd_kernel" in capsys.readouterr().out and record["kind"] == "profile"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "OP must be one of adamw_ema, .*got 'nothing'"),
        (["train_step"], "OP must be one of"),
        (["ema", "--case", "x"], "--case must fit one of speech base.*got 'x'"),
        (["ema", "--mode", "fwd+bwd"], "--mode of ema must be fwd, got 'fwd.bwd'"),
        (["ema", "--provider", "x"], "--provider must be one of d2v_fast, "),
        (["ema"], "ncu .* is not installed"),
    ],
)
def test_errors(arguments, message, monkeypatch):
    monkeypatch.setattr(profile_op, "program", lambda name: None)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        profile_op.main(arguments)


def test_ncu_fails(tmp_path, monkeypatch):
    fake_ncu(tmp_path, monkeypatch, "==ERROR== unknown metric", status=1)
    with pytest.raises(SystemExit, match="error: ncu ended with status 1: ==ERROR== unknown metric"):
        profile_op.main(["ema"])


def test_counters_that_a_gpu_lacks(tmp_path, monkeypatch):
    """They are left out at a second attempt."""
    seen = fake_ncu(tmp_path, monkeypatch, f"==ERROR== Failed to find metric {COLUMNS[-1]}", status=1)
    with pytest.raises(SystemExit, match="ncu ended with status 1"):
        profile_op.main(["ema"])
    assert seen.read_text().splitlines()[12] == ",".join(COLUMNS[:-1])
    page = raw_page(TWO).replace(f',"{COLUMNS[-1]}"', ',"other"')
    assert profile_op.parse(page)[0]["local_bytes"] is None


def test_the_marked_call(monkeypatch):
    """What ncu sees is one warm call."""
    import torch
    from driver import Provider

    calls = []
    bench, case, mode = profile_op.pick("masked_smooth_l1", None, None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    real = bench.providers["d2v_fast"].load()
    counting = Provider(lambda: lambda **arguments: calls.append("call") or real(**arguments))
    monkeypatch.setitem(bench.providers, "d2v_fast", counting)
    profile_op.marked_call(bench, bench.smoke[0], mode, "d2v_fast")
    assert mode == "fwd+bwd" and case.name == bench.cases[0].name
    assert calls == ["call"] * profile_op.WARM_UP + ["start", "call", "stop"]
