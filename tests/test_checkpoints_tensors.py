"""Tensors of checkpoints that are missing, odd, shared, of other names or kinds."""

import json

import pytest
import torch
from checkpoint_files import FORMATS, assert_same, make, rewrite, rewrite_directory, safetensors
from tiny import tiny_batch

from d2v_fast.checkpoints import (
    load_fairseq,
    load_transformers,
    read_any,
    rules,
    save_fairseq,
    save_transformers,
    write_as,
)
from d2v_fast.errors import CheckpointError


@pytest.mark.parametrize(("modality", "format"), FORMATS)
def test_problems_with_tensors_are_listed_together(modality, format, tmp_path):
    """A missing, an unexpected, a wrongly shaped and an integer tensor: one message names all four."""
    path = tmp_path / "x"
    write_as(make(modality), path, format)
    found = {}

    def change(state):
        names = sorted(n for n, x in state.items() if isinstance(x, torch.Tensor) and "layer" in n + "layer")
        names = [name for name in names if "mlp.fc" in name or "fc" in name or "dense.weight" in name]
        found["missing"], found["shape"], found["type"] = names[0], names[1], names[2]
        del state[names[0]]
        state[names[1]] = torch.zeros(3, 7)
        state[names[2]] = torch.zeros(state[names[2]].shape, dtype=torch.int32)
        state["something.else"] = torch.zeros(1)

    if path.is_dir():
        rewrite_directory(path, tensors=change)
    else:
        rewrite(path, lambda content: change(content["model"]))
    with pytest.raises(CheckpointError) as error:
        read_any(path)
    message = str(error.value)
    prefix = "model." if format == "beit" else ""
    for expected in (
        f"{prefix}{found['missing']} is missing",
        f"{prefix}{found['shape']} must have shape",
        f"{prefix}{found['type']} must be a tensor of floating-point numbers of 16, 32 or 64 bits, got torch.int32",
        f"{prefix}something.else is unexpected",
    ):
        assert expected in message, message


TOKENS = "encoder.sentence_encoder.embed_tokens.weight"


def test_tensors_that_share_memory_do_not_multiply(tmp_path):
    """One large tensor in the place of many: a small file, and a model of any size. Twice is what a teacher may be."""
    model = make("text", dim=256, ffn_dim=1024, layers=6)
    save_fairseq(model, tmp_path / "x.pt")
    small = (tmp_path / "x.pt").stat().st_size

    def share(content):
        for state in (content["model"], content["model"]["encoder._ema"]):
            for name, x in state.items():
                if isinstance(x, torch.Tensor) and x.dim() == 2 and len(x) > 50:
                    state[name] = shared.setdefault(x.shape, x.clone())

    shared: dict = {}
    rewrite(tmp_path / "x.pt", share)
    assert (tmp_path / "x.pt").stat().st_size < small / 5
    expected = sum(x.numel() for x in model.state_dict().values())
    read_any(tmp_path / "x.pt")  # by a constant: for real models, far below what they have
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "ALWAYS_FINE", 0)
        with pytest.raises(
            CheckpointError, match=rf"a model of {expected} elements from tensors that have \d+ together"
        ):
            read_any(tmp_path / "x.pt")
        for modality, format in FORMATS:  # what is written passes, without teacher and head, too
            write_as(make(modality), tmp_path / f"{modality}-{format}", format)
            read_any(tmp_path / f"{modality}-{format}")


def test_expanded_tensors_do_not_decide_of_sizes(tmp_path):
    """The size of the vocabulary is that of a tensor."""
    save_fairseq(make("text"), tmp_path / "x.pt")
    table = torch.zeros(1).expand(100_000, 32)

    def change(content):
        content["model"][TOKENS] = content["model"]["encoder._ema"]["embed_tokens.weight"] = table

    rewrite(tmp_path / "x.pt", change)
    with pytest.raises(CheckpointError, match=r"a tensor of size \(100000, 32\) at 0 in a storage of 1 elements"):
        read_any(tmp_path / "x.pt")


def test_two_names_that_become_one_are_refused(tmp_path):
    """Whichever came last would be the weights."""
    save_fairseq(make("text"), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    layer = "encoder.sentence_encoder.layers.0."
    for name, x, becomes in (
        ("decoder.sentence_encoder.layers.0.fc1.weight", torch.zeros(48, 32), f"{layer}fc1.weight"),
        (f"{layer}self_attn.in_proj_weight", torch.zeros(96, 32), f"{layer}self_attn.q_proj.weight"),
        ("decoder._ema", content["model"]["encoder._ema"], "_ema.embed_tokens.weight"),
    ):
        torch.save({**content, "model": {**content["model"], name: x}}, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match=rf"two tensors become {becomes}$"):
            read_any(tmp_path / "y.pt")
    save_transformers(make("text"), tmp_path / "z")
    name = "encoder.layer.0.intermediate.dense.weight"
    rewrite_directory(
        tmp_path / "z", tensors=lambda state: state.update({f"data2vec_text.{name}": state[name].clone()})
    )
    with pytest.raises(CheckpointError, match=f"two tensors become {name}"):
        read_any(tmp_path / "z")


def test_tensors_of_other_kinds_are_named(tmp_path):
    """Layouts and dtypes that weights do not have, in files of fairseq; complex and 8-bit ones in directories."""
    save_fairseq(make("speech"), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    name = "encoder.layers.0.fc1.weight"
    x = content["model"][name]
    eight = x.to(torch.float8_e4m3fn)
    for other in (x.to_sparse(), x.to("meta"), eight, x.to(torch.complex64), x.int()):
        torch.save({**content, "model": {**content["model"], name: other}}, tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match=f"{name} must be a tensor of floating-point numbers of 16, 32 or 64"):
            read_any(tmp_path / "y.pt")
    save_transformers(make("text"), tmp_path / "z")
    name = "encoder.layer.0.intermediate.dense.weight"
    rewrite_directory(tmp_path / "z", tensors=lambda state: state.update({name: eight}))
    with pytest.raises(CheckpointError, match=f"{name} must be .* got torch.float8_e4m3fn"):
        read_any(tmp_path / "z")


def test_weights_that_are_no_numbers_are_kept(tmp_path):
    """A run that has diverged can be looked at."""
    model = make("speech")
    with torch.no_grad():
        model.encoder.layers[0].fc1.weight.fill_(torch.nan)
    save_fairseq(model, tmp_path / "x.pt")
    assert read_any(tmp_path / "x.pt").model.encoder.layers[0].fc1.weight.isnan().all()


def test_half_a_teacher_is_refused(tmp_path):
    save_fairseq(make("speech"), tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", lambda content: content["model"]["_ema"].pop("layers.1.fc1.weight"))
    with pytest.raises(CheckpointError, match=r"_ema\.layers\.1\.fc1\.weight is missing"):
        load_fairseq(tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", lambda content: content["model"].pop("_ema"))
    loaded = read_any(tmp_path / "x.pt")
    assert loaded.report.initialised["teacher.module.encoder.layers.1.fc1.weight"] == "the student's"


def test_legacy_names_of_fairseq(tmp_path):
    """Fused projections, and the names that text models had; heads of other tasks are dropped."""
    model = make("text")
    save_fairseq(model, tmp_path / "x.pt")

    def fused(state):
        """Three projections as one, in the order of the file's time."""
        parts = {name: x for name, x in state.items() if "_proj." in name and "out_proj" not in name}
        result = {name: x for name, x in state.items() if name not in parts}
        for name in (name for name in parts if "q_proj." in name):
            stem, _, kind = name.partition("q_proj.")
            result[f"{stem}in_proj_{kind}"] = torch.cat([parts[f"{stem}{p}_proj.{kind}"] for p in "qkv"])
        return result

    def old(name):
        name = name.replace("encoder.", "decoder.", 1).replace("regression_head", "lm_head")
        return name.replace("layernorm_embedding", "emb_layer_norm") if "." in name else name

    def change(content):
        teacher = content["model"].pop("encoder._ema")
        student = {old(name): x for name, x in fused(content["model"]).items()}
        unknown = {"classification_heads.mnli.dense.weight": torch.zeros(2), "encoder.target_model.x": torch.zeros(2)}
        content["model"] = {**student, **unknown, "decoder._ema": fused(teacher)}

    rewrite(tmp_path / "x.pt", change)
    loaded = read_any(tmp_path / "x.pt")
    assert_same(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert {"classification_heads.mnli.dense.weight", "encoder.target_model.x"} < set(loaded.report.dropped)


def test_transformers_torch_weights(tmp_path):
    """``pytorch_model.bin`` in place of safetensors, in one piece or several; pieces stay inside of the directory."""
    model = make("text")
    folder = tmp_path / "x"
    save_transformers(model, folder)
    state = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors or pytorch_model\.bin"):
        load_transformers(folder)
    torch.save(state, folder / "pytorch_model.bin")
    inputs = tiny_batch(model.config).inputs
    with torch.no_grad():
        want = model.encode(inputs)
        assert torch.equal(load_transformers(folder).encode(inputs), want)
        names = sorted(state)
        pieces = {name: f"part-{i % 2}.bin" for i, name in enumerate(names)}
        for piece in set(pieces.values()):
            torch.save({name: state[name] for name in names if pieces[name] == piece}, folder / piece)
        (folder / "pytorch_model.bin").unlink()
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": pieces}))
        assert torch.equal(load_transformers(folder).encode(inputs), want)
    index.write_text(json.dumps({"weight_map": {"x": "../x/part-0.bin"}}))
    with pytest.raises(CheckpointError, match="must name files beside it"):
        load_transformers(folder)
    index.write_text(json.dumps({"weight_map": {"x": "part-7.bin"}}))
    with pytest.raises(CheckpointError, match=r"no file at .*part-7\.bin"):
        load_transformers(folder)


def test_pieces_with_the_same_tensor(tmp_path):
    save_transformers(make("text"), tmp_path / "x")
    state = safetensors.load_file(tmp_path / "x/model.safetensors")
    (tmp_path / "x/model.safetensors").rename(tmp_path / "x/a.safetensors")
    name = sorted(state)[0]
    safetensors.save_file({name: state[name]}, tmp_path / "x/b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "x/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"two tensors become {name}"):
        read_any(tmp_path / "x")
