"""Recipes on other numbers of GPUs: what stays exactly as published, and what the formulas make of the rest."""

import pytest
from typer.testing import CliRunner

from d2v_fast.cli import app
from d2v_fast.train.config import config_to_dict, differences, load_config
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.optim import learning_rate
from d2v_fast.train.recipes import check_processes, describe, gpu_counts, load_recipe, on_gpus, recipe_overrides, table

DATA = "data.path=somewhere"
PUBLISHED = ["speech_base", "speech_large", "image_base", "image_large", "text_base"]


def published(preset: str, *more: str):
    return load_config(preset, [DATA, *more])


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_powers_of_two_only_accumulate(preset, gpus):
    """The same micro-batches in every update; nothing else of the configuration changes."""
    config, recipe = load_recipe(preset, [DATA], gpus)
    reference = published(preset).reference_gpus
    assert recipe.factor == 1 and recipe.accumulate * gpus == reference and "exact" in recipe.notes[0]
    changed = differences(config_to_dict(published(preset)), config_to_dict(config), ignore=())
    assert [line.split(":")[0] for line in changed] == (["accumulate"] if gpus < reference else [])


def test_more_gpus_than_published_have_smaller_micro_batches():
    config, recipe = load_recipe("text_base", [DATA], 32)
    assert (config.accumulate, config.data.batch_size, recipe.batch, recipe.factor) == (1, 8, 256, 1)
    assert recipe.notes == ("the same blocks an update; they are put together in micro-batches differently",)


def test_a_smaller_micro_batch_accumulates_more():
    config, recipe = load_recipe("image_base", [DATA, "data.batch_size=32"], 8)
    assert (config.accumulate, config.data.batch_size, recipe.factor) == (8, 32, 1)
    # 100 would fit; three micro-batches of 85.3 do not make 2048, four of 64 do
    config, recipe = load_recipe("image_base", [DATA, "data.batch_size=100"], 8)
    assert (config.accumulate, config.data.batch_size, recipe.factor) == (4, 64, 1)
    # a GPU that takes more than published
    config, recipe = load_recipe("image_base", [DATA, "data.batch_size=512"], 2)
    assert (config.accumulate, config.data.batch_size, recipe.factor) == (2, 512, 1)


def test_samples_of_speech_divide_up_to_rounding():
    config, recipe = load_recipe("speech_base", [DATA], 3)
    assert (config.accumulate, config.data.max_tokens, recipe.factor) == (6, 3_377_778, 1)
    assert abs(recipe.batch - 60_800_000) < 3 * 6 and "up to rounding" in recipe.notes[0]
    assert config.updates == 400_000 and config.model.ema == published("speech_base").model.ema


@pytest.mark.parametrize(("rule", "times"), [("sqrt", 0.5), ("linear", 0.25)])
def test_another_batch(rule, times):
    """A quarter of the batch: four times the updates, and everything at the same place by items seen."""
    old = published("text_base")
    config, recipe = load_recipe("text_base", [DATA, "accumulate=1"], 4, rule)
    assert recipe.factor == 0.25 and (config.accumulate, config.data.batch_size) == (1, 16)
    assert config.updates == 4 * old.updates and config.schedule.warmup_updates == 4 * old.schedule.warmup_updates
    assert config.optim.lr == pytest.approx(times * old.optim.lr)
    assert config.optim.betas == old.optim.betas and config.optim.weight_decay == old.optim.weight_decay
    for share in (0.005, 0.01, 0.3, 0.9):  # in the warm-up, at its end, and behind it
        rates = [learning_rate(round(share * c.updates), c.updates, c.optim, c.schedule) for c in (old, config)]
        assert rates[1] == pytest.approx(times * rates[0], rel=1e-3)


def test_the_teacher_forgets_as_many_items():
    """After as many items, the weight of the start in the average is the published one: products of decays agree."""
    old = published("text_base").model.ema
    new = load_recipe("text_base", [DATA, "accumulate=1"], 4)[0].model.ema
    assert new.anneal_updates == 4 * old.anneal_updates
    for update in (0, 1000, 150_000, 299_000, 300_000, 500_000):
        four = 1.0
        for step in range(4):
            four *= new.decay_at(4 * update + step)
        assert 1 - four == pytest.approx(1 - old.decay_at(update), rel=2e-3)
    assert new.end_decay**4 == pytest.approx(old.end_decay, abs=1e-11)


def test_a_teacher_that_steps_with_every_micro_batch():
    """As released: two micro-batches on each of 8 GPUs step it twice an update, which two square roots undo."""
    config, recipe = load_recipe("text_base", [DATA, "model.profile=fairseq"], 8)
    old = published("text_base", "model.profile=fairseq")
    assert old.model.ema.per == "micro_batch" and recipe.factor == 1 and config.accumulate == 2
    assert config.model.ema.decay**2 == pytest.approx(old.model.ema.decay, abs=1e-11)
    assert config.model.ema.end_decay**2 == pytest.approx(old.model.ema.end_decay, abs=1e-11)
    assert config.updates == old.updates and "steps 2 times an update" in recipe.notes[1]


def test_what_is_given_has_the_last_word():
    given = [DATA, "accumulate=1", "optim.lr=1e-3", "updates=77", "seed=5"]
    config, recipe = load_recipe("image_base", given, 2)
    assert (config.optim.lr, config.updates, config.seed) == (1e-3, 77, 5)
    assert not {"optim.lr", "updates"} & recipe.changes.keys() and recipe.factor == 0.125
    overrides, _ = recipe_overrides("image_base", given, 2)
    assert load_config("image_base", overrides) == config


def test_bad_arguments():
    config = published("image_base")
    for arguments, message in (
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"gpus": 2, "micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"gpus": 2, "lr_rule": "cube"}, "lr_rule must be one of sqrt, linear, got 'cube'"),
        ({"gpus": 8192}, "gpus must be fewer: 2048 images an update leave 0 for a micro-batch of each of 8192"),
    ):
        with pytest.raises(ConfigError, match=message):
            on_gpus(config, **arguments)
    with pytest.raises(ConfigError, match=r"leave 237500 for .* each of 256, which needs at least 320000"):
        on_gpus(published("speech_base"), 256)
    with pytest.raises(ConfigError, match=r"unknown key 'sed'"):
        load_recipe("text_base", [DATA, "sed=1"], 2)
    assert gpu_counts("1, 2,16") == [1, 2, 16]
    for text in ("", "2,", "two", "0", "-1", "1.5"):
        with pytest.raises(ConfigError, match=r"--gpus must be positive numbers such as 1,2,4, got"):
            gpu_counts(text)
    check_processes(4, 4)
    with pytest.raises(ConfigError, match=r"--gpus must be the number of processes, 1, got 4; .*--nproc_per_node=4"):
        check_processes(4, 1)


def test_words():
    config, recipe = load_recipe("image_base", [DATA, "accumulate=1"], 4)
    text = describe(recipe, config)
    for line in (
        "recipe for 4 GPUs: 4 x 1 x 128 = 512 images an update (published: 2048)",
        "  NOT the published batch: 0.25 times as large",
        "  learning rate by the sqrt rule: times 0.5",
        "  updates = 2000000",
        "  time: no measurement of this model on any GPU",
    ):
        assert line in text.splitlines()
    assert "one copy on each GPU: 1.76 GiB (parameters 0.32 GiB," in text and "computed, without activations" in text


def test_one_gpu_is_no_plural():
    config, recipe = load_recipe("image_base", [DATA], 1)
    assert describe(recipe, config).startswith("recipe for 1 GPU: 1 x 16 x 128 ")


def test_table_needs_no_data():
    lines = table("speech_base", [], [1, 16]).splitlines()
    assert lines[0].split()[:4] == ["GPUs", "accumulate", "per", "GPU"]
    assert lines[1].split()[:5] == ["1", "16", "3800000", "60800000", "published"]
    assert lines[2].split()[:5] == ["16", "1", "3800000", "60800000", "published"]
    assert lines[-1] == "time: no measurement of this model on any GPU"


def test_commands(tmp_path, monkeypatch):
    """The table, and a run that is refused before anything is made: one process is not two."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    shown = CliRunner().invoke(app, ["recipe", "text_base", "data.batch_size=8", "--gpus", "2,16"])
    assert shown.exit_code == 0 and [line.split()[1] for line in shown.stdout.splitlines()[1:3]] == ["16", "2"]
    arguments = ["pretrain", "text_base", "data.path=x", f"out={tmp_path / 'run'}", "--gpus", "2"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigError) and "--gpus must be the number of processes" in str(error)
    assert not (tmp_path / "run").exists()
