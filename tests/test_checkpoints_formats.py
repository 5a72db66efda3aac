"""Our model in the four formats and back: every tensor bit by bit, what is lost is said, what does not fit is refused.

The formats as the libraries themselves write them: test_parity_checkpoints.py.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from tiny import tiny_batch, tiny_config

from d2v_fast.checkpoints import (
    averaged,
    check_target,
    load_beit,
    load_fairseq,
    load_pretrained,
    load_transformers,
    read_any,
    rules,
    save_beit,
    save_fairseq,
    save_pretrained,
    save_transformers,
    write_as,
)
from d2v_fast.checkpoints import native as native_format
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec, Data2VecConfig

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
MODALITIES = ("speech", "text", "image")
FORMATS = [
    *((modality, format) for modality in MODALITIES for format in ("native", "transformers")),
    ("speech", "fairseq"),
    ("text", "fairseq"),
    ("image", "beit"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(modality: str, dtype: torch.dtype = torch.float32, profile: str = "fairseq", **encoder) -> Data2Vec:
    """A tiny model; no tensor at a trivial value, the teacher apart from the student."""
    model = Data2Vec(tiny_config(modality, profile, **encoder))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def rewrite(path, change) -> None:
    """Apply ``change`` to the content of a torch file."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def rewrite_directory(folder, config=None, tensors=None) -> None:
    """Apply changes to the configuration and the tensors of a directory."""
    if config is not None:
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        state = safetensors.load_file(folder / "model.safetensors")
        tensors(state)
        safetensors.save_file(state, folder / "model.safetensors")


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


def assert_same(a, b, path="") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


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


def fairseq_model(values):
    return lambda content: content["cfg"]["model"].update(values)


FAIRSEQ_OPTIONS = [
    ("speech", {"layer_norm_first": True}, "layer_norm_first=True is not supported, only False"),
    ("speech", {"activation_fn": "relu"}, "activation_fn='relu' is not supported, only 'gelu'"),
    ("speech", {"layer_type": "conformer"}, "layer_type='conformer'"),
    ("speech", {"pos_enc_type": "rel_pos"}, "pos_enc_type='rel_pos'"),
    ("speech", {"group_norm_target_layer": True}, "group_norm_target_layer=True"),
    ("speech", {"ema_transformer_only": False, "ema_layers_only": False}, "ema_transformer_only=False"),
    ("speech", {"layer_norm_target_layer": True}, "instance_norm_target_layer and layer_norm_target_layer together"),
    ("speech", {"pos_conv_depth": 1}, "pos_conv_depth=1"),
    ("speech", {"extractor_mode": "other"}, "extractor_mode='other'"),
    ("speech", {"dropout": "much"}, "dropout must be a number, got 'much'"),
    ("speech", {"encoder_layers": 3.5}, "encoder_layers must be an integer, got 3.5"),
    ("speech", {"encoder_attention_heads": 5}, "encoder.dim 32 must be a multiple of heads 5"),
    ("speech", {"ema_anneal_end_step": "${nowhere}"}, "ema_anneal_end_step must be an integer"),
    ("speech", {"_name": "wav2vec2"}, "must hold a data2vec_audio or data2vec_text model, got 'wav2vec2'"),
    ("speech", {"_name": "data2vec_multi"}, "got 'data2vec_multi'"),
    ("speech", {"conv_feature_layers": "__import__('os').system('true')"}, "conv_feature_layers must be a list"),
    ("speech", {"conv_feature_layers": "[(512, 3, 2)] * 99999999999"}, "conv_feature_layers must be a list"),
    ("speech", {"conv_feature_layers": "[(16, 10, 5)]" + " * 64" * 9}, "conv_feature_layers must be a list"),
    ("speech", {"conv_feature_layers": "[(1, 2)]"}, "conv_feature_layers must be a list"),
    ("speech", {"conv_pos_groups": 0}, "pos_conv_groups|modulo by zero"),
    ("speech", {"encoder_layers": 10**9}, "3 layers, the configuration says 1000000000"),
    ("speech", {"pos_conv_depth": 10**9}, "the configuration says 1000000000 position convolutions"),
    ("text", {"head_layers": 10**9}, "the configuration says 1000000000 layers of the head"),
    ("text", {"transformer": {}}, "activation_fn='relu' is not supported, only 'gelu'; layernorm_embedding=False"),
]


@pytest.mark.parametrize(("modality", "values", "message"), FAIRSEQ_OPTIONS)
def test_options_that_cannot_be_followed(modality, values, message, tmp_path):
    save_fairseq(make(modality), tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", fairseq_model(values))
    with pytest.raises(CheckpointError) as error:
        load_fairseq(tmp_path / "x.pt")
    assert any(part in str(error.value) for part in message.split("|"))


def test_options_of_training_are_noted(tmp_path):
    save_fairseq(make("speech"), tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", fairseq_model({"mask_channel_prob": 0.1, "loss_scale": 0.5}))
    loaded = read_any(tmp_path / "x.pt")
    assert loaded.report.notes == ["mask_channel_prob=0.1 has no counterpart here"]
    assert loaded.model.config.loss.scale == 0.5
    save_fairseq(make("text"), tmp_path / "y.pt")
    rewrite(tmp_path / "y.pt", lambda content: content["cfg"]["task"].update(random_token_prob=0.1))
    assert read_any(tmp_path / "y.pt").report.notes == ["random_token_prob=0.1 has no counterpart here"]


@pytest.mark.parametrize("kind", ["cfg", "args"])
def test_waveforms_of_fairseq(kind, tmp_path):
    """Their rate, and whether they are normalised, are options of the task."""
    config = tiny_config("speech", "fairseq")
    model = Data2Vec(replace(config, frontend=replace(config.frontend, sample_rate=8000)))
    save_fairseq(model, tmp_path / "x.pt")
    loaded = read_any(tmp_path / "x.pt")
    assert loaded.model.config.frontend.sample_rate == 8000 and loaded.report.notes == []

    def change(**task):
        def apply(content):
            if kind == "args":
                cfg = content["cfg"]
                options = {**cfg["model"], **cfg["task"], **task, "arch": "data2vec_audio"}
                content["args"], content["cfg"] = argparse.Namespace(**options), None
            else:
                content["cfg"]["task"].update(task)

        content = torch.load(tmp_path / "x.pt", weights_only=True)
        apply(content)
        torch.save(content, tmp_path / "y.pt")
        return tmp_path / "y.pt"

    loaded = read_any(change(sample_rate=44_100, normalize=False))
    assert loaded.model.config.frontend.sample_rate == 44_100
    assert loaded.report.notes == ["task.normalize=False: it knows waveforms as they are, not normalised ones"]
    for value, message in (
        (0, "task.sample_rate must be positive, got 0"),
        ("x", "task.sample_rate must be an integer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_any(change(sample_rate=value))


def test_interpolated_options(tmp_path):
    save_fairseq(make("speech"), tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", fairseq_model({"ema_anneal_end_step": "${optimization.max_update}"}))
    rewrite(tmp_path / "x.pt", lambda content: content["cfg"]["optimization"].update(max_update=1234))
    assert load_fairseq(tmp_path / "x.pt").config.ema.anneal_updates == 1234


@pytest.mark.parametrize(
    ("modality", "values", "message"),
    [
        ("speech", {"model_type": "wav2vec2"}, "data2vec-audio, data2vec-text, data2vec-vision, got 'wav2vec2'"),
        ("speech", {"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12 is not supported, only 1e-05"),
        ("speech", {"num_conv_pos_embeddings": 1}, "must be at least 2 of 3"),
        ("speech", {"conv_dim": [16, 16]}, "conv_dim, conv_kernel and conv_stride"),
        ("text", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("text", {"pad_token_id": 0}, "pad_token_id=0"),
        ("text", {"hidden_size": "wide"}, "hidden_size must be an integer, got 'wide'"),
        ("text", {"hidden_size": 2**40, "num_attention_heads": 1}, "must have shape|no model can have"),
        ("text", {"num_hidden_layers": 10**9}, "3 layers, the configuration says 1000000000"),
        ("image", {"use_absolute_position_embeddings": True}, "use_absolute_position_embeddings=True"),
        ("image", {"use_relative_position_bias": True}, "together are not supported"),
        ("image", {"image_size": [24, 32]}, "image_size must be one integer, got [24, 32]"),
        ("image", {"image_size": 25}, "image_size must be a multiple of patch_size"),
        ("image", {"layer_scale_init_value": 1e308}, "a configuration that no model can have"),
        ("image", {"num_attention_heads": 0}, "encoder.heads must be positive"),
    ],
)
def test_transformers_options_that_cannot_be_followed(modality, values, message, tmp_path):
    save_transformers(make(modality), tmp_path / "x")
    rewrite_directory(tmp_path / "x", config=lambda config: config.update(values))
    with pytest.raises(CheckpointError) as error:
        load_transformers(tmp_path / "x")
    assert any(part in str(error.value) for part in message.split("|"))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_transformers_eps(modality, tmp_path):
    """What it is there is used here, and written again."""
    save_transformers(make(modality, norm_eps=1e-3), tmp_path / "x")
    assert load_transformers(tmp_path / "x").config.encoder.norm_eps == 1e-3
    rewrite_directory(tmp_path / "x", config=lambda config: config.update(layer_norm_eps=1e-4))
    assert load_transformers(tmp_path / "x").config.encoder.norm_eps == 1e-4
    rewrite_directory(tmp_path / "x", config=lambda config: config.pop("layer_norm_eps"))
    assert load_transformers(tmp_path / "x").config.encoder.norm_eps == 1e-12


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


def test_transformers_images_without_a_final_norm(tmp_path):
    """Those that average over the patches have none (their default): the report says what differs."""
    save_transformers(make("image"), tmp_path / "x")
    assert not any("final norm" in note for note in read_any(tmp_path / "x").report.notes)
    rewrite_directory(tmp_path / "x", tensors=lambda s: [s.pop(f"layernorm.{kind}") for kind in ("weight", "bias")])
    loaded = read_any(tmp_path / "x")
    assert loaded.report.notes == [
        "no final norm there (use_mean_pooling): hidden_states()[-1] is its output, encode() is not"
    ]


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


def test_beit_options(tmp_path):
    """Options from argparse's Namespace; without any, the published recipe; a damaged index does not matter."""
    model = make("image")
    path = tmp_path / "x.pth"
    save_beit(model, path)
    rewrite(path, lambda content: content["model_ema"]["rel_pos_bias.relative_position_index"].sub_(1))
    content = torch.load(path, weights_only=True)
    content["args"] = argparse.Namespace(**content["args"], device="cuda", betas=(0.9, 0.999), clip_grad=None)
    torch.save(content, path)
    loaded = read_any(path)
    assert loaded.model.config == model.config
    assert_same(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert torch.equal(loaded.model.teacher.module["encoder"].relative_bias.index, model.encoder.relative_bias.index)

    del content["args"]
    torch.save(content, path)
    recipe = Data2VecConfig.image(profile="fairseq")
    config = load_beit(path).config
    assert config.loss == recipe.loss and config.ema == recipe.ema and config.encoder.dim == 32
    for values, message in (
        ({"abs_pos_emb": True}, "abs_pos_emb=True is not supported"),
        ({"target_layers": [0, 2]}, r"target_layers=\[0, 2\] is not supported, only the last ones of 3"),
        ({"drop_path": "x"}, "drop_path must be a number, got 'x'"),
    ):
        torch.save({**content, "args": argparse.Namespace(**values)}, path)
        with pytest.raises(CheckpointError, match=message):
            load_beit(path)
    torch.save({**content, "args": {"var_w0": 1.0, "target_layers": "[1, 2]"}}, path)
    loaded = read_any(path)
    assert loaded.report.notes == ["var_w0=1.0 has no counterpart here"] and loaded.model.config.targets.top_k == 2


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


@pytest.mark.parametrize(
    ("modality", "changes", "save", "message"),
    [
        ("speech", {"norm_eps": 1e-6}, save_fairseq, "encoder.norm_eps=1e-06 would become 1e-05"),
        ("speech", {"key_bias": False}, save_fairseq, "encoder.key_bias=False would become True"),
        ("speech", {"pos_conv_depth": 1}, save_fairseq, "pos_conv_depth=1 is not supported"),
        ("speech", {"pos_conv_depth": 1}, save_transformers, "must be at least 2 of 3"),
        ("speech", {"norm": "pre"}, save_transformers, "encoder.norm='pre' would become 'post'"),
        ("text", {"norm_eps": 1e-6}, save_fairseq, "encoder.norm_eps"),
        ("image", {"norm_eps": 1e-5}, save_beit, "encoder.norm_eps=1e-05 would become 1e-06"),
        ("image", {"key_bias": True}, save_transformers, "encoder.key_bias=True would become False"),
    ],
)
def test_models_that_a_format_has_no_place_for(modality, changes, save, message, tmp_path):
    """Refused, and nothing is written."""
    model = make(modality, **changes)
    with pytest.raises(CheckpointError, match="has no place for this model") as error:
        save(model, tmp_path / "x")
    assert message in str(error.value) and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("modality", MODALITIES)
def test_native_configuration(modality, tmp_path):
    """Any setting survives; unknown names and wrong types are listed together."""
    config = tiny_config(modality, "paper", drop_path=0.1, dropout=0)
    config = replace(config, loss=replace(config.loss, scale=0.25), prune=replace(config.prune, unpad=False))
    values = json.loads(json.dumps(asdict(config)))
    assert native_format.config_from_dict("x", values) == config
    values["encoder"]["width"] = 3
    values["encoder"]["layers"] = "12"
    values["targets"]["norm"] = "other"
    values["ema"] = 7
    values["surprise"] = None
    with pytest.raises(CheckpointError) as error:
        native_format.config_from_dict("x", values)
    for part in (
        "model.encoder.width is unknown",
        "model.encoder.layers must be of type int, got '12'",
        "model.targets.norm must be of type",
        "model.ema must be a group of values, got 7",
        "model.surprise is unknown",
    ):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match=r"model\.modality must be one of speech, image, text, got 'smell'"):
        native_format.config_from_dict("x", {"modality": "smell"})
    values = json.loads(json.dumps(asdict(config)))
    values["encoder"]["heads"] = 3
    with pytest.raises(CheckpointError, match=r"encoder\.dim 32 must be a multiple of heads 3"):
        native_format.config_from_dict("x", values)


@pytest.mark.parametrize("modality", MODALITIES)
def test_native_configuration_with_gaps(modality):
    """What decides of features must be there; the rest is the recipe's, not that of another modality."""
    recipe = getattr(Data2VecConfig, modality)()
    whole = json.loads(json.dumps(asdict(recipe)))
    for group in ("targets", "loss", "ema", "prune"):
        values = {name: x for name, x in whole.items() if name != group}
        assert native_format.config_from_dict("x", values) == recipe
    for name in ("dropout", "drop_path", "attention_dropout", "layerdrop", "init", "checkpointing"):
        values = {**whole, "encoder": {key: x for key, x in whole["encoder"].items() if key != name}}
        assert native_format.config_from_dict("x", values) == recipe
    size = {"speech": "conv_layers", "text": "max_positions", "image": "patch_size"}[modality]
    values = json.loads(json.dumps(whole))
    for name in ("norm", "norm_eps", "key_bias", "layer_scale", "pos_conv_depth", "layer_result", "padding_aware"):
        del values["encoder"][name]
    del values["frontend"][size]
    with pytest.raises(CheckpointError) as error:
        native_format.config_from_dict("x", values)
    for name in ("encoder.norm", "encoder.norm_eps", "encoder.pos_conv_depth", "encoder.layer_result"):
        assert f"model.{name} is missing" in str(error.value)
    assert f"model.frontend.{size} is missing" in str(error.value)
    for eps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=f"encoder.norm_eps must be positive, got {eps}"):
            native_format.config_from_dict("x", {**whole, "encoder": {**whole["encoder"], "norm_eps": eps}})


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
