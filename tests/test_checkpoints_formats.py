"""Our model in the four formats and back: every tensor bit by bit, what is lost is said, what does not fit is refused.

The formats as the libraries themselves write them: test_parity_checkpoints.py.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from checkpoint_files import FORMATS, MODALITIES, assert_same, make, safetensors
from tiny import tiny_batch, tiny_config

from d2v_fast.checkpoints import (
    averaged,
    check_target,
    load_beit,
    load_fairseq,
    load_pretrained,
    load_transformers,
    read_any,
    save_beit,
    save_fairseq,
    save_pretrained,
    save_transformers,
    write_as,
)
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("modality", "format"), FORMATS)
def test_round_trips_are_bit_equal(modality, format, dtype, tmp_path):
    """Ours -> file -> ours for every tensor that the file has, and file -> ours -> file."""
    model = make(modality, dtype)
    write_as(model, tmp_path / "x", format)
    loaded = read_any(tmp_path / "x")
    assert loaded.report.format == f"{format} {modality}" and not loaded.model.training
    want, got = model.state_dict(), loaded.model.state_dict()
    fresh = loaded.report.initialised
    assert {rule.ours for rule in loaded.report.mapped} | fresh.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        if fresh.get(name) != "random" and not (format == "transformers" and name.startswith("teacher.")):
            assert torch.equal(got[name], x), name
    kept = {"native", "fairseq", "beit"}
    assert not [name for name, how in fresh.items() if how == "random"] or format not in kept
    assert loaded.model.config == model.config or format not in kept

    write_as(loaded.model, tmp_path / "y", format)
    first, second = (tmp_path / name / "model.safetensors" for name in "xy")
    if (tmp_path / "x").is_dir():
        assert first.read_bytes() == second.read_bytes()
        assert (tmp_path / "x/config.json").read_text() == (tmp_path / "y/config.json").read_text()
    else:
        assert_same(*(torch.load(tmp_path / name, weights_only=True) for name in "xy"))


@pytest.mark.parametrize(("modality", "format"), FORMATS)
def test_features_are_kept(modality, format, tmp_path):
    """The loaded model computes the same, and, where the format holds the teacher, learns the same."""
    model = make(modality)
    batch = tiny_batch(model.config)
    write_as(model, tmp_path / "x", format)
    back = read_any(tmp_path / "x").model
    with torch.no_grad():
        assert torch.equal(back.encode(batch.inputs), model.encode(batch.inputs))
        if format != "transformers":
            assert torch.equal(back(batch).loss, model(batch).loss)


def test_the_teacher_is_the_student_where_there_is_none(tmp_path):
    """And what our own format writes once is shared again."""
    save_transformers(make("text"), tmp_path / "x")
    model = load_transformers(tmp_path / "x")
    for name, x in model.teacher.module.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name
    save_pretrained(model, tmp_path / "y")
    written = safetensors.load_file(tmp_path / "y/model.safetensors")
    assert "teacher.module.frontend.tokens.weight" not in written and "frontend.tokens.weight" in written
    again = load_pretrained(tmp_path / "y")
    teacher = again.teacher.module["frontend"]
    assert teacher.tokens.weight.data_ptr() == again.frontend.tokens.weight.data_ptr()


def test_dtypes(tmp_path):
    """Half-precision files become float32 models unless told otherwise; averages are float32 in both."""
    save_fairseq(make("speech", torch.bfloat16), tmp_path / "x.pt")
    for dtype, want in ((torch.float32, torch.float32), (None, torch.bfloat16), (torch.float16, torch.float16)):
        model = load_fairseq(tmp_path / "x.pt", dtype=dtype)
        assert model.encoder.layers[0].fc1.weight.dtype == want
        assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}


def test_averages_in_place_of_the_student():
    for modality in MODALITIES:
        model = make(modality)
        result = averaged(model)
        state, teacher = result.state_dict(), model.teacher.module.state_dict()
        for name, x in model.state_dict().items():
            assert torch.equal(state[name], teacher.get(name, x)), name
        assert not torch.equal(state["encoder.layers.0.fc1.weight"], model.encoder.layers[0].fc1.weight)


@pytest.mark.parametrize("format", ["beit", "transformers"])
def test_images_without_table_and_scales(format, tmp_path):
    """The number of heads is then 1 for 64 channels in the BEiT format, which does not say it."""
    model = make("image", relative_bias=False, layer_scale=0.0, dim=128)
    write_as(model, tmp_path / "x", format)
    back = read_any(tmp_path / "x").model
    assert back.config.encoder == replace(model.config.encoder, padding_aware=back.config.encoder.padding_aware)
    assert_same(dict(back.encoder.state_dict()), dict(model.encoder.state_dict()))
    if format == "beit":
        with pytest.raises(CheckpointError, match=r"encoder\.heads=4 would become 2"):
            save_beit(make("image", relative_bias=False, dim=128, heads=4), tmp_path / "y")


def test_beit_names(tmp_path):
    """The layout of the released files (their number of tensors: test_parity_checkpoints.py)."""
    model = make("image")
    save_beit(model, tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    save_transformers(model, tmp_path / "hf")
    state, layer = safetensors.load_file(tmp_path / "hf/model.safetensors"), model.encoder.layers[1]
    assert not torch.equal(layer.scale1, layer.scale2)
    for n, scale in ((1, layer.scale1), (2, layer.scale2)):  # of attention, of the FFN
        assert torch.equal(content["model"][f"blocks.1.gamma_{n}"], scale)
        assert torch.equal(state[f"encoder.layer.1.lambda_{n}"], scale)
    assert content["model"].keys() == content["model_ema"].keys()
    block = {f"blocks.1.{name}" for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.qkv.weight")}
    block |= {
        f"blocks.1.{n}.{k}" for n in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for k in ("weight", "bias")
    }
    assert block == {name for name in content["model"] if name.startswith("blocks.1.")}
    assert content["model"]["cls_token"].shape == content["model"]["mask_token"].shape == (1, 1, 32)
    assert content["model"]["rel_pos_bias.relative_position_bias_table"].shape == (11**2 + 3, 2)
    index = content["model"]["rel_pos_bias.relative_position_index"]
    assert index.shape == (37, 37) and index[0, 0] == 11**2 + 2 and index[0, 5] == 11**2 and index[5, 0] == 11**2 + 1


def test_formats_of_other_modalities(tmp_path):
    with pytest.raises(CheckpointError, match=r"got an image model \(see save_beit\)"):
        save_fairseq(make("image"), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"got a text model \(see save_fairseq\)"):
        save_beit(make("text"), tmp_path / "x")
    config = tiny_config("speech")
    group = Data2Vec(replace(config, frontend=replace(config.frontend, conv_norm="group")))
    with pytest.raises(CheckpointError, match=r"frontend\.conv_norm='group' would become 'layer'"):
        save_transformers(group, tmp_path / "x")
    save_fairseq(group, tmp_path / "x")
    assert_same(dict(load_fairseq(tmp_path / "x").state_dict()), dict(group.state_dict()))


def test_settings_that_are_lost_are_noted(tmp_path):
    report = save_fairseq(make("speech", profile="paper"), tmp_path / "x")
    assert (
        "targets.padding_aware=True becomes False" in report.notes
        and "ema.per='update' becomes 'micro_batch'" in report.notes
    )
    report = save_transformers(make("speech"), tmp_path / "y")
    assert report.notes[0] == "no place for settings of targets, loss, ema, mask, head_layers"
    assert "head.0.weight" in report.dropped and "2 x  dropped: head.*" in report.table()


def test_damaged_directories(tmp_path):
    folder = tmp_path / "x"
    with pytest.raises(CheckpointError, match="no file at"):
        load_pretrained(folder)
    save_pretrained(make("text"), folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole + b"x",
    ):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no file at .*model\.safetensors"):
        load_pretrained(folder)
    weights.write_bytes(whole)
    text = config.read_text()
    for damaged, message in (
        ("", "cannot read"),
        (text[:50], "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[1]", "must hold a JSON object, got list"),
        ("{}", "must be of format 'd2v_fast', version 1"),
        (text.replace('"version": 1', '"version": 2'), "version 1"),
        (text.replace('"layers": 3', '"layers": 1000000000'), "3 layers, the configuration says 1000000000"),
        (text.replace('"dim": 32', '"dim": 64'), "must have shape"),
    ):
        config.write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(folder)
    config.write_text(text)
    load_pretrained(folder)


def test_files_that_are_none_of_the_formats(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.ones(1), "epoch": 3}, path)
    with pytest.raises(
        CheckpointError, match="must be a checkpoint of fairseq or the BEiT fork, got a dictionary with 'weights'"
    ):
        read_any(path)
    with pytest.raises(CheckpointError, match="must be a fairseq checkpoint"):
        load_fairseq(path)
    with pytest.raises(CheckpointError, match="must be a checkpoint of the BEiT fork"):
        load_beit(path)
    torch.save(torch.ones(1), path)
    with pytest.raises(CheckpointError, match="got Tensor"):
        read_any(path)
    torch.save({"model": {"mask_emb": torch.ones(2)}, "cfg": None, "args": None}, path)
    with pytest.raises(CheckpointError, match="must hold a configuration under 'cfg' or 'args', got neither"):
        read_any(path)
    with pytest.raises(TypeError, match="path_or_model must be a path or a model of transformers, got int"):
        load_transformers(3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must be of d2v_fast or transformers"):
        read_any(tmp_path / "folder")


def test_targets_are_checked_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    check_target(tmp_path / "folder", "native")  # empty
    (tmp_path / "folder/file").write_text("mine")
    for name, format, force, message in (
        ("new", "onnx", False, "must be one of fairseq, transformers, beit, native, got 'onnx'"),
        ("file", "fairseq", False, "exists: choose another name"),
        ("folder", "native", False, "exists: choose another name"),
        ("file", "native", True, "must be a directory for the native format"),
        ("folder", "beit", True, "must be a file for the beit format"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_target(tmp_path / name, format, force)
    check_target(tmp_path / "file", "fairseq", force=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "mine"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    model = make("speech")
    path = tmp_path / "x.pt"
    save_fairseq(model, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="could not write"):
        save_fairseq(model, tmp_path / "x.pt/below.pt")
    with pytest.raises(CheckpointError, match="could not write"):
        save_pretrained(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


ALONE = """
import sys
for name in ("transformers", "fairseq", "omegaconf", "hydra", "typer", "pydantic", "triton"):
    sys.modules[name] = None  # as if not installed
import d2v_fast
for load, path in (("load_transformers", "hf"), ("load_fairseq", "fairseq.pt")):
    print(getattr(d2v_fast, load)(sys.argv[1] + "/" + path).config.modality)
"""


def test_other_libraries_are_not_needed(tmp_path):
    """Not even for configurations made of their objects."""
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf to write its objects")
    model = make("speech")
    model.save_transformers(tmp_path / "hf")
    path = tmp_path / "fairseq.pt"
    model.save_fairseq(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "cfg": omegaconf.OmegaConf.create(content["cfg"])}, path)
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["speech", "speech"]


@pytest.mark.parametrize("modality", MODALITIES)
def test_methods_of_the_model(modality, tmp_path):
    model = make(modality)
    model.save_pretrained(tmp_path / "native")
    assert_same(dict(Data2Vec.from_pretrained(tmp_path / "native").state_dict()), dict(model.state_dict()))
    model.save_transformers(tmp_path / "hf")
    assert (tmp_path / "hf/config.json").exists()
    (model.save_beit if modality == "image" else model.save_fairseq)(tmp_path / "x.pt")
    assert_same(dict(read_any(tmp_path / "x.pt").model.state_dict()), dict(model.state_dict()))


def test_written_files_can_be_shared(tmp_path):
    """They have the permissions of any new file."""
    model = make("speech")
    model.save_fairseq(tmp_path / "x.pt")
    model.save_pretrained(tmp_path / "native")
    (tmp_path / "any").touch()
    for path in (tmp_path / "x.pt", *(tmp_path / "native").iterdir()):
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
