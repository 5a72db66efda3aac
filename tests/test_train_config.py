"""Presets, overrides, schedules: the published values, and clear refusals."""

import dataclasses

import pytest

from d2v_fast.train.config import (
    complete_model,
    config_from_dict,
    config_to_dict,
    differences,
    load_config,
    presets,
)
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.optim import OptimConfig, ScheduleConfig, learning_rate

DATA = "data.path=somewhere"


def test_all_presets_load_and_round_trip():
    assert {"speech_base", "speech_large", "image_base", "image_large", "text_base"} <= set(presets())
    assert {"speech_demo", "image_demo", "text_demo"} <= set(presets())
    for name in presets():
        config = load_config(name, [DATA])
        assert config_from_dict(config_to_dict(config)) == config


# The published recipes (spec of the released code and the paper's appendix), value by value.
PUBLISHED = {
    "speech_base": {
        "encoder": (12, 768, 3072, 12),
        "rates": (0.1, 0.1, 0.0, 0.05, 0.0),
        "targets": (8, "instance", "none"),
        "loss": (0.0, 768**-0.5),
        "mask": {"prob": 0.65, "length": 10, "min_spans": 1},
        "ema": (0.999, 0.9999, 30_000),
        "optim": (5e-4, (0.9, 0.98), 1e-6, 0.01, 0.0),
        "batch": ("max_tokens", 3_800_000, 16),
        "updates": 400_000,
    },
    "image_base": {
        "encoder": (12, 768, 3072, 12),
        "rates": (0.0, 0.05, 0.0, 0.0, 0.25),
        "targets": (6, "layer", "layer"),
        "loss": (2.0, 1 / 768),
        "mask": {"num_masked": 120, "min_block": 16},
        "ema": (0.9998, 0.9998, 0),
        "optim": (2e-3, (0.9, 0.999), 1e-8, 0.05, 3.0),
        "batch": ("batch_size", 128, 16),
        "updates": 800 * 625,
    },
    "image_large": {
        "encoder": (24, 1024, 4096, 16),
        "rates": (0.0, 0.15, 0.0, 0.0, 0.2),
        "targets": (6, "layer", "layer"),
        "loss": (2.0, 1 / 1024),
        "mask": {"num_masked": 120, "min_block": 16},
        "ema": (0.9998, 0.9998, 0),
        "optim": (1e-3, (0.9, 0.999), 1e-8, 0.05, 3.0),
        "batch": ("batch_size", 64, 64),
        "updates": 800 * 312,
    },
    "text_base": {
        "encoder": (12, 768, 3072, 12),
        "rates": (0.1, 0.1, 0.0, 0.0, 0.0),
        "targets": (10, "layer", "none"),
        "loss": (4.0, 1.0),
        "mask": {"prob": 0.35, "length": 4},
        "ema": (0.999, 0.9999, 300_000),
        "optim": (2e-4, (0.9, 0.98), 1e-6, 0.01, 5.0),
        "batch": ("batch_size", 16, 16),
        "updates": 1_000_000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    want, config = PUBLISHED[name], load_config(name, [DATA])
    e, t, o, m = config.model.encoder, config.model.targets, config.optim, config.model
    assert (e.layers, e.dim, e.ffn_dim, e.heads) == want["encoder"]
    assert (e.dropout, e.attention_dropout, e.activation_dropout, e.layerdrop, e.drop_path) == want["rates"]
    assert (t.top_k, t.norm, t.post_norm) == want["targets"]
    assert (m.loss.beta, m.loss.scale_for(e.dim)) == want["loss"]
    assert {k: getattr(m.mask, k) for k in want["mask"]} == want["mask"]
    assert (m.ema.decay, m.ema.end_decay, m.ema.anneal_updates) == want["ema"]
    assert (o.lr, o.betas, o.eps, o.weight_decay, o.clip_norm) == want["optim"]
    key, value, gpus = want["batch"]
    assert getattr(config.data, key) == value and config.reference_gpus == gpus
    assert config.updates == want["updates"]


def test_published_details():
    speech, image, text = (load_config(f"{m}_base", [DATA]) for m in ("speech", "image", "text"))
    assert (speech.schedule.warmup_updates, speech.schedule.decay_updates) == (12_000, 28_000)  # 3 / 90 / 7 %
    assert (speech.guards.min_target_var, speech.guards.min_pred_var, speech.guards.after_updates) == (0.1, 0.01, 5000)
    assert image.model.encoder.layer_scale == 1e-4 and not image.model.encoder.key_bias
    assert load_config("image_large", [DATA]).model.encoder.layer_scale == 1e-5
    assert not image.optim.decay_vectors and speech.optim.decay_vectors and text.optim.decay_vectors
    assert text.data.tokens_per_sample == 512 and text.model.head_layers == 2
    assert text.model.frontend.vocab_size == 50_265 and text.model.frontend.max_positions == 512
    assert (speech.data.min_seconds, speech.data.max_seconds) == (2.0, 20.0)


def test_overrides_reach_every_level():
    config = load_config("speech_base", [DATA, "model.encoder.layers=10", "optim.betas=[0.8,0.9]", "optim.lr=1e-4"])
    assert config.model.encoder.layers == 10 and config.optim.betas == (0.8, 0.9) and config.optim.lr == 1e-4
    assert config.model.encoder.dim == 768
    assert config.out == "runs/speech_base"  # so that runs of two presets do not meet in one folder
    released = load_config("text_base", [DATA, "model.profile=fairseq"])
    assert released.model.targets.teacher_input == "masked"


def test_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {modality: image, size: base}\ndata: {path: images}\nupdates: 7\n")
    assert load_config(str(path), ["updates=9"]).updates == 9


@pytest.mark.parametrize(
    ("preset", "overrides", "match"),
    [
        ("speech_bse", [DATA], "unknown preset 'speech_bse': did you mean 'speech_base'"),
        ("nowhere.yaml", [DATA], "cannot read the configuration nowhere.yaml"),
        ("speech_base", [], "data.path is missing"),
        ("speech_base", [DATA, "updtes=3"], "unknown key 'updtes': did you mean 'updates'"),
        ("speech_base", [DATA, "model.encoder.layesr=3"], "did you mean 'model.encoder.layers'"),
        # in another group, all of them that have the name
        ("speech_base", [DATA, "layers=6"], r"'layers': did you mean 'model.encoder.layers'\? known here: model, "),
        ("speech_base", [DATA, "model.layers=6"], r"did you mean 'model.encoder.layers'\? known here: modality, "),
        ("speech_base", [DATA, "encoder.layers=6"], r"'encoder': did you mean 'model.encoder'\?"),
        ("speech_base", [DATA, "data.lr=1"], r"'data.lr': did you mean 'optim.lr'\?"),
        ("text_base", [DATA, "dropout=0"], r"mean 'model.frontend.dropout' or 'model.encoder.dropout'\?"),
        ("speech_base", [DATA, "xyzzy=1"], "unknown key 'xyzzy': known here: model, data"),
        ("speech_base", [DATA, "model.encoder=3"], "model.encoder is a group of keys"),
        ("speech_base", [DATA, "model.encoder.layers=many"], "model.encoder.layers: .*got 'many'"),
        ("speech_base", [DATA, "model.encoder.layers=0"], "encoder.layers must be positive, got 0"),
        ("speech_base", [DATA, "model.encoder.layers=3"], "targets.top_k 8 must not exceed encoder.layers 3"),
        ("speech_base", [DATA, "model.modality=smell"], "model.modality must be one of speech, image, text"),
        ("speech_base", [DATA, "model.size=tiny"], "^model.size: speech size must be one of base, large, got 'tiny'"),
        ("speech_base", [DATA, "model.profile=x"], "^model.profile: profile must be 'paper' or 'fairseq', got 'x'"),
        ("speech_base", [DATA, "precision=fp8"], "precision: .*got 'fp8'"),
        ("speech_base", [DATA, "updates"], "an override must look like key=value, got 'updates'"),
        ("speech_base", [DATA, "updates=0"], "updates must be at least 1, got 0"),
        ("speech_base", [DATA, "data.min_seconds=0"], "data.min_seconds must be positive"),
        ("speech_base", [DATA, "optim.lr=-1"], "optim.lr must be a number >= 0, got -1.0"),
        ("speech_base", [DATA, "optim.betas=[0.9,1.0]"], r"optim.betas must be in \[0, 1\)"),
        ("speech_base", [DATA, "schedule.warmup_updates=-1"], "schedule.warmup_updates must be >= 0"),
        ("speech_base", [DATA, "workers=-1"], "workers must be at least 0, got -1"),
        ("speech_base", [DATA, "seed=-1"], "seed must be at least 0, got -1"),
        ("speech_base", [DATA, "model=foo"], "model is a group of keys, got the single value 'foo'"),
        ("speech_base", ["data.path=["], "overrides: "),
        ("speech_base", [DATA, "seed=99999999999999999999999"], r"^seed must be below 2\*\*63, got 9{23}$"),
        ("speech_base", [DATA, "reference_gpus=0"], "^reference_gpus must be at least 1, got 0$"),
        ("speech_base", [DATA, "guards.warn_pred_var=nan"], "^guards.warn_pred_var must be at least 0 and finite, got"),
        ("speech_base", [DATA, "optim.eps=0"], r"^optim.eps must be a number above 0, got 0.0$"),
        ("speech_base", [DATA, "optim.betas=[0.9]"], r"^optim.betas: .*missing of tuple\[float, float\], got \[0.9\]$"),
        ("speech_base", [DATA, "schedule.init_scale=nan"], "^schedule.init_scale must be >= 0, got nan$"),
        ("speech_base", [DATA, "updates=${nothing}"], "^overrides: Interpolation key 'nothing' not found.*updates.*$"),
        # a group is said once, and all of them
        ("speech_base", [DATA, "updates=0"], "^updates must be"),
        ("speech_base", [DATA, "optim.lr=-1"], "^optim.lr must be"),
        ("speech_base", [DATA, "data.min_seconds=0"], "^data.min_seconds must be"),
        ("speech_base", [DATA, "model.ema.decay=2"], "^model.ema.decay and end_decay must be"),
        ("speech_base", [DATA, "model.encoder.layers=3"], "^model.targets.top_k 8 must not exceed"),
    ],
)
def test_refusals(preset, overrides, match):
    with pytest.raises(ConfigError, match=match):
        load_config(preset, overrides)


def test_bad_yaml_files(tmp_path):
    for text, match in (
        (b"a: [\n", "cannot read the configuration .*: while parsing .*$"),
        (b"\xff\xfe\xfd", "cannot read the configuration"),
        (b"5", "cannot read the configuration"),
        (b"[1, 2]", "must hold keys and values"),
    ):
        (tmp_path / "bad.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=match):
            load_config(str(tmp_path / "bad.yaml"))


def test_folders_named_like_numbers():
    config = load_config("speech_base", ["data.path=2024", "out=1"])
    assert (config.data.path, config.out) == ("2024", "1")


def test_differences_ignore_where_and_how_often():
    a = load_config("speech_base", [DATA])
    b = load_config("speech_base", [DATA, "out=elsewhere", "workers=7", "optim.lr=1e-3"])
    assert differences(config_to_dict(a), config_to_dict(b)) == ["optim.lr: 0.0005 -> 0.001"]


def test_tri_stage():
    optim, schedule = (
        OptimConfig(lr=5e-4),
        ScheduleConfig(kind="tri_stage", warmup_updates=12_000, decay_updates=28_000),
    )
    rate = lambda update: learning_rate(update, 400_000, optim, schedule)  # noqa: E731
    assert rate(0) == pytest.approx(5e-6)
    assert rate(6_000) == pytest.approx(5e-4 * (0.01 + 0.99 / 2))
    assert rate(12_000) == rate(371_999) == 5e-4
    assert rate(386_000) == pytest.approx(5e-5)  # half of the exponential decay
    assert rate(400_000) == pytest.approx(5e-6)


def test_cosine():
    optim = OptimConfig(lr=2e-3)
    schedule = ScheduleConfig(kind="cosine", warmup_updates=100, final_scale=0.005)
    rate = lambda update: learning_rate(update, 1100, optim, schedule)  # noqa: E731
    assert rate(0) == 0.0
    assert rate(50) == pytest.approx(1e-3)
    assert rate(100) == pytest.approx(2e-3)
    assert rate(600) == pytest.approx((2e-3 + 1e-5) / 2)
    assert rate(1100) == pytest.approx(1e-5)


def test_configs_are_frozen():
    config = load_config("speech_base", [DATA])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.updates = 3


def test_older_checkpoints_get_the_keys_that_came_later():
    """Where they belong to a profile, the file's; the others stay out of the comparison."""
    for profile in ("paper", "fairseq"):
        config = load_config("speech_base", [DATA, f"model.profile={profile}"])
        now = config_to_dict(config)
        then = {key: value for key, value in now["model"].items() if key != "prune"}
        later = ("padding_aware", "checkpointing", "attention_backend", "attention_strict")
        then["encoder"] = {key: value for key, value in then["encoder"].items() if key not in later}
        assert complete_model(then) == now["model"]
        assert now["model"]["encoder"]["padding_aware"] == (profile == "paper")
    other = load_config("speech_base", [DATA, "model.profile=fairseq", "model.prune.unpad=false"])
    assert not other.model.prune.unpad
    assert differences(now, config_to_dict(other)) == []
