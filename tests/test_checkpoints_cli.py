"""``d2v-fast convert`` and ``d2v-fast export``: what they write, print and refuse."""

import sys

import pytest
import torch
from tiny import tiny_config

from d2v_fast.checkpoints import load_fairseq, load_pretrained, load_transformers, save_fairseq
from d2v_fast.checkpoints.convert import WRITERS
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec

typer = pytest.importorskip("typer", reason="needs the train extra")
pytest.importorskip("safetensors", reason="needs safetensors")

from d2v_fast import cli  # noqa: E402


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``d2v-fast`` with arguments; gives (exit code, what it printed, its error)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["d2v-fast", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code or 0
            message = end.code if isinstance(end.code, str) else ""
        printed = capsys.readouterr()
        return code, printed.out, message or printed.err

    return run


@pytest.fixture
def fairseq_file(tmp_path):
    """A tiny speech model in half precision, whose teacher is not the student."""
    model = Data2Vec(tiny_config("speech", "fairseq")).half()
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(1)
    save_fairseq(model, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_formats_are_those_that_can_be_written():
    assert {format.value for format in cli.Format} == set(WRITERS)


def test_convert(command, fairseq_file, tmp_path):
    code, out, _ = command("convert", fairseq_file, tmp_path / "hf", "--to", "transformers")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [f"read {fairseq_file}", "fairseq speech:"] and f"wrote {tmp_path / 'hf'}" in lines
    for row in (
        "encoder.layers.*.attention.qkv  encoder.layers.*.attention.{q,k,v}_proj",
        "2 x  dropped: head.*",
        "x  dropped: teacher",
        "note: no place for settings of targets",
    ):
        assert row in out
    got = load_transformers(tmp_path / "hf", dtype=None)
    want = load_fairseq(fairseq_file, dtype=None)
    assert torch.equal(got.encoder.layers[2].fc2.weight, want.encoder.layers[2].fc2.weight)
    assert got.encoder.layers[2].fc2.weight.dtype == torch.float16

    code, out, _ = command("convert", tmp_path / "hf", tmp_path / "native", "--to", "native")
    assert code == 0 and "transformers speech:" in out
    assert "2 x  initialised: head.* (random)" in out and "initialised: teacher (the student's)" in out
    load_pretrained(tmp_path / "native")


def test_convert_refuses(command, fairseq_file, tmp_path):
    """One line and exit code 1; nothing is overwritten without --force."""
    target = tmp_path / "native"
    assert command("convert", fairseq_file, target, "--to", "native")[0] == 0
    before = (target / "model.safetensors").stat().st_mtime_ns
    for arguments, message in (
        ((fairseq_file, target, "--to", "native"), f"{target} exists: choose another name, or replace it with --force"),
        ((fairseq_file, tmp_path / "y.pth", "--to", "beit"), "BEiT files hold image models, got a speech model"),
        ((tmp_path / "nothing", tmp_path / "y", "--to", "native"), "no file at"),
    ):
        code, _, error = command("convert", *arguments)
        assert code == 1 and error.startswith("error: ") and message in error and "\n" not in error
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert command("convert", fairseq_file, target, "--to", "native", "--force")[0] == 0
    assert (target / "model.safetensors").stat().st_mtime_ns > before
    assert command("convert", fairseq_file, target, "--to", "onnx")[0] == 2


def test_convert_refuses_what_wants_to_run(command, tmp_path):
    class Attack:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'effect')!r}, 'w')",)

    torch.save({"cfg": {}, "model": {}, "x": Attack()}, tmp_path / "x.pt")
    code, _, error = command("convert", tmp_path / "x.pt", tmp_path / "y", "--to", "native")
    assert code == 1 and "builtins.eval" in error and not (tmp_path / "effect").exists()


@pytest.fixture
def run_checkpoint(tmp_path):
    """A checkpoint of a run, as the training loop writes it."""
    from run_folders import save

    from d2v_fast.train.checkpoint import Progress
    from d2v_fast.train.config import TrainConfig
    from d2v_fast.train.data import TextDataConfig

    config = tiny_config("text")
    model = Data2Vec(config)
    with torch.no_grad():
        for p in model.teacher.module["encoder"].parameters():
            p.add_(1)
    optimizer = torch.optim.AdamW(model.parameters())
    run = TrainConfig(model=config, data=TextDataConfig(path="somewhere"))
    return save(tmp_path, model, optimizer, Progress(update=3), run), model


def test_export(command, run_checkpoint, tmp_path):
    path, model = run_checkpoint
    state = model.state_dict()
    code, out, _ = command("export", path, tmp_path / "native")
    assert code == 0 and out.startswith(f"wrote {tmp_path / 'native'}\nnative text:")
    exported = load_pretrained(tmp_path / "native")
    assert exported.config == model.config
    assert all(torch.equal(x, state[name]) for name, x in exported.state_dict().items())

    assert "the teacher's" not in out
    code, out, _ = command("export", path, tmp_path / "hf", "--to", "transformers", "--teacher")
    assert code == 0 and "dropped: teacher" not in out and "dropped: head.*" in out
    assert "note: written are the teacher's averages, under the student's names" in out
    averages = load_transformers(tmp_path / "hf")
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(averages.state_dict()[name], state[f"teacher.module.{name}"])
    assert command("export", path, tmp_path / "hf", "--to", "transformers")[0] == 1
    assert command("export", path, tmp_path / "x.pt", "--to", "fairseq")[0] == 0
    assert torch.equal(load_fairseq(tmp_path / "x.pt").state_dict()[name], state[name])


def test_export_wants_a_checkpoint_of_a_run(command, fairseq_file, run_checkpoint, tmp_path):
    code, _, error = command("export", fairseq_file, tmp_path / "y")
    assert code == 1 and "is not a d2v_fast checkpoint" in error
    code, _, error = command("convert", run_checkpoint[0], tmp_path / "y", "--to", "native")
    assert code == 1 and "is a checkpoint of a run: use d2v-fast export" in error


def test_without_safetensors(monkeypatch, tmp_path):
    """An extra is not a requirement: what needs it says how to get it."""
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    model = Data2Vec(tiny_config("text"))
    with pytest.raises(CheckpointError, match=r"pip install 'd2v-fast\[checkpoints\]'"):
        model.save_pretrained(tmp_path / "x")
    save_fairseq(model, tmp_path / "x.pt")
    load_fairseq(tmp_path / "x.pt")
