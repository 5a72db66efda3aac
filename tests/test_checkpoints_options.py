"""Configurations in checkpoints: options that are followed, noted or refused."""

import argparse
import json
from dataclasses import asdict, replace

import pytest
import torch
from checkpoint_files import MODALITIES, assert_same, make, rewrite, rewrite_directory
from tiny import tiny_config

from d2v_fast.checkpoints import (
    load_beit,
    load_fairseq,
    load_transformers,
    read_any,
    save_beit,
    save_fairseq,
    save_transformers,
)
from d2v_fast.checkpoints import native as native_format
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec, Data2VecConfig


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


def test_transformers_images_without_a_final_norm(tmp_path):
    """Those that average over the patches have none (their default): the report says what differs."""
    save_transformers(make("image"), tmp_path / "x")
    assert not any("final norm" in note for note in read_any(tmp_path / "x").report.notes)
    rewrite_directory(tmp_path / "x", tensors=lambda s: [s.pop(f"layernorm.{kind}") for kind in ("weight", "bias")])
    loaded = read_any(tmp_path / "x")
    assert loaded.report.notes == [
        "no final norm there (use_mean_pooling): hidden_states()[-1] is its output, encode() is not"
    ]


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
