"""What is said of a run that goes wrong, and when it ends: spreads, updates that are not finite, losses out of line."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from text_runs import write_text
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.nn.data2vec import SPREAD_ROWS, feature_spread
from d2v_fast.train import load_config, pretrain, start
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.data import build_data
from d2v_fast.train.errors import TrainingStopped
from d2v_fast.train.guards import SHARED, SPREADS, GuardConfig, Guards, Taken, Window
from d2v_fast.train.logging import read_records
from d2v_fast.train.spikes import ENOUGH, SpikeLog
from d2v_fast.train.step import StepMetrics

GOOD = {"target_var": 0.5, "pred_var": 0.5, "feature_var": 0.5}


def test_feature_spread_is_of_the_positions_that_count():
    """Near 1 for unrelated positions of any scale and offset, 0 for equal ones; rows that fill up do not count."""
    rows = torch.randn(3, 50, 64)
    at = torch.tensor([5, -1, 7, 149, -1, 60, 61])
    kept = rows.flatten(0, 1)[at[at >= 0]]
    normal = (kept - kept.mean(1, keepdim=True)) / kept.std(1, correction=0, keepdim=True)
    assert feature_spread(rows, at).item() == pytest.approx(normal.std(0, correction=0).mean().item(), rel=1e-4)
    every = torch.arange(150)
    spread = feature_spread(rows, every).item()
    assert 0.95 < spread <= 1
    assert feature_spread(1e3 * rows, every).item() == pytest.approx(spread, rel=1e-3)
    assert feature_spread(rows[:1, :1].expand(3, 50, -1), every).item() == pytest.approx(0, abs=1e-6)
    collapsed = torch.randn(64) + 0.01 * rows  # what fairseq#5239 saw
    assert feature_spread(collapsed, every).item() == pytest.approx(0.01, rel=0.3)
    for none in (torch.full((4,), -1), torch.zeros(1, dtype=torch.int64), every[:0]):
        assert feature_spread(rows, none).item() == 0
    many = torch.randn(1, 3 * SPREAD_ROWS + 1, 8)
    assert 0.9 < feature_spread(many, torch.arange(many.shape[1])).item() <= 1


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_a_model_says_how_much_its_features_spread(modality):
    """Of the recipe as a whole; a front-end whose output does not depend on its input is seen."""
    config = tiny_config(modality)
    model, batch = Data2Vec(config), tiny_batch(config, padded=modality == "text")
    assert 0.2 < model(batch).feature_var.item() <= 1
    with torch.no_grad():
        for module in (model, model.teacher.module):
            for name, p in module.named_parameters():
                if any(part in name for part in ("frontend.proj.weight", "frontend.tokens", "frontend.positions")):
                    p.fill_(0)
                if "frontend.proj.bias" in name or "frontend.norm.bias" in name:
                    p.copy_(torch.randn_like(p))
    output = model(batch)
    assert output.feature_var.item() < 1e-3 and output.feature_var.dtype == torch.float32
    assert not output.feature_var.requires_grad


def metrics(loss=1.0, skipped=0.0) -> StepMetrics:
    values = torch.tensor([loss, 0.5, 0.4, 0.3, 2.0, skipped])
    return StepMetrics(*values, ema_decay=0.9, num_masked=10)


def test_a_window_counts_what_is_not_finite_in_a_row():
    window = Window()
    for update, skipped in enumerate([0, 1, 0, 1, 1]):
        window.add(Progress(update, 0, update), metrics(float("nan") if skipped else update, skipped))
    assert dict(zip(SHARED, window.take(), strict=True)) == {
        "loss": 1.0,
        "target_var": 0.5,
        "pred_var": pytest.approx(0.4),
        "feature_var": pytest.approx(0.3),
        "grad_norm": 2.0,
        "skipped": 3,
    }
    assert window.nonfinite == 2
    assert [(one.before.update, one.skipped) for one in window.taken] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)]
    window.add(Progress(5), metrics(float("nan"), 1))
    assert window.take()[-1] == 1 and window.nonfinite == 3 and len(window.taken) == 1


def test_a_row_of_skips_that_is_over_before_the_log_counts():
    """So that ``max_nonfinite`` means the same however often is logged; a row goes on over a log."""
    window, seen = Window(), []
    for update, letter in enumerate("0110|1|1110|0|01"):
        if letter == "|":
            window.take()
            seen.append(window.nonfinite)
        else:
            window.add(Progress(update), metrics(skipped=float(letter)))
    window.take()
    assert [*seen, window.nonfinite] == [2, 1, 4, 0, 1]


def test_too_many_updates_in_a_row_stop_a_run():
    guards = Guards(GuardConfig(max_nonfinite=3))
    guards.check({"update": 10, **GOOD}, 3)
    with pytest.raises(TrainingStopped, match=r"update 11: .* 4 updates in a row \(guards.max_nonfinite = 3\). Lower"):
        guards.check({"update": 11, **GOOD}, 4)


@pytest.mark.parametrize("name", ["target_var", "pred_var", "feature_var"])
def test_a_low_spread_is_warned_of_before_it_stops_a_run(name, caplog):
    """Once a crossing, and again only after it has been well above; the stop is looked at late in a run only."""
    config = GuardConfig(after_updates=100, **{f"warn_{name}": 0.4, f"min_{name}": 0.2})
    guards, warned = Guards(config), {}
    late = 100 if name == "pred_var" else 0  # at the start of good runs predictions differ little
    for update, value in enumerate([0.5, 0.39, 0.3, 0.41, 0.39, 0.1, 0.45, 0.39], late + 1):
        caplog.clear()
        if update > 100 and value < 0.2:
            continue
        guards.check({"update": update, **GOOD, name: value}, 0)
        warned[update - late] = len(caplog.records)
    assert [step for step, count in warned.items() if count] == [2, 8]
    assert all(count <= 1 for count in warned.values())
    assert f"{name} 0.3900 is below guards.warn_{name} = 0.4. The run stops below 0.2 from update 100" in caplog.text
    caplog.clear()
    early = Guards(config)
    early.check({"update": 100, **GOOD, name: 0.1}, 0)
    assert bool(caplog.records) == (name != "pred_var")
    with pytest.raises(TrainingStopped, match=rf"collapsed: {name} 0.1900 is below guards.min_{name} = 0.2"):
        early.check({"update": 101, **GOOD, name: 0.19}, 0)
    caplog.clear()
    Guards(replace(config, **{f"min_{name}": 0.0})).check({"update": 101, **GOOD, name: 0.1}, 0)
    assert f"The run stops never for that (guards.min_{name})" in caplog.text
    off = Guards(replace(config, **{f"warn_{name}": 0.0, f"min_{name}": 0.0}))
    caplog.clear()
    off.check({"update": 101, **GOOD, name: 0.0}, 0)
    assert not caplog.records


def test_a_whole_window_of_nan_is_no_collapse(caplog):
    """Spreads are NaN if every update of a window was skipped."""
    Guards(GuardConfig(after_updates=0)).check({"update": 5, **dict.fromkeys(GOOD, float("nan"))}, 5)
    assert not caplog.records


@pytest.mark.parametrize(
    "bad",
    [
        {"spike_window": 0},
        {"spike_deviations": -1.0},
        {"spike_deviations": float("nan")},
        {"max_nonfinite": -1},
        {"after_updates": -1},
        *({f"{kind}_{name}": value} for kind in ("min", "warn") for name in SPREADS for value in (-0.1, float("nan"))),
        {"min_target_var": float("inf")},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=rf"guards\.{next(iter(bad))} must be at least"):
        GuardConfig(**bad)


# what is out of line


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    text = write_text(tmp_path / "text", lines=60)
    sizes = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2}
    return [
        *(f"model.encoder.{name}={size}" for name, size in sizes.items()),
        *("model.frontend.vocab_size=270", "model.frontend.max_positions=16", "model.targets.top_k=2"),
        *(
            f"data.path={text}",
            f"out={tmp_path / 'run'}",
            "data.batch_size=8",
            "data.tokens_per_sample=16",
        ),
        *("workers=0", "device=cpu", "log_every=5", "updates=40", "checkpoint_every=100", "optim.lr=0"),
    ]


def lines(folder: Path) -> list[dict]:
    return read_records(folder / "spikes.jsonl")


def test_losses_out_of_line(overrides, tmp_path, caplog):
    """Compared with those of the updates before; one does not hide the next, and a new level is one after a while."""
    config = load_config("text_demo", overrides)
    data = build_data(config.data, config.model, 1)
    log = SpikeLog(tmp_path, data, GuardConfig(spike_deviations=4.0, spike_window=40), 2, 1, 0)
    normal = [1.0 + 0.01 * (i % 5) for i in range(ENOUGH)]

    def note(first: int, losses: list[float], skipped: tuple[int, ...] = ()) -> None:
        taken = [Taken(Progress(first + i, 0, first + i), 0.0, i in skipped) for i in range(len(losses))]
        log.note(taken, losses)

    note(0, normal[:-1])
    note(29, [9.0])  # too few to say
    assert lines(tmp_path) == []
    log = SpikeLog(tmp_path, data, GuardConfig(spike_deviations=4.0, spike_window=40), 2, 1, 0)
    note(0, normal)
    assert not (tmp_path / "spikes.jsonl").exists()
    note(30, [1.02, 1.2, 1.05])
    note(33, [50.0, float("nan"), 1.0], skipped=(1,))
    note(36, [1.2])
    found = lines(tmp_path)
    assert [(row["update"], row["loss"]) for row in found] == [(32, 1.2), (34, 50.0), (35, None), (37, 1.2)]
    assert found[0]["limit"] == pytest.approx(1.02 + 4 * 0.01 * 2**0.5) and found[2]["limit"] is None
    assert caplog.text.count("loss out of line or not finite in update 34, 35: batches are in") == 1
    for step in range(40):
        note(37 + step, [1.2])
    assert lines(tmp_path)[-1]["update"] < 60
    quiet = SpikeLog(tmp_path / "text", data, GuardConfig(spike_deviations=0.0), 1, 1, 0)
    quiet.note([Taken(Progress(i), 0.0, False) for i in range(99)], [*([1.0] * 98), 1e9])
    assert not (tmp_path / "text" / "spikes.jsonl").exists()


def test_lines_of_updates_that_are_made_again_are_taken_out(overrides, tmp_path):
    config = load_config("text_demo", overrides)
    data = build_data(config.data, config.model, 1)
    rows = [{"update": update} for update in (3, 7, 9)]
    (tmp_path / "spikes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"upd', encoding="utf-8")
    SpikeLog(tmp_path, data, GuardConfig(), 1, 1, 7)
    assert lines(tmp_path) == rows[:2]


def test_a_run_notes_the_batches_of_a_spike(overrides, tmp_path, monkeypatch, caplog):
    """They can be read again, and are those that the update had, across the end of an epoch as well."""
    real, made = start.train_step, []

    def step(model, batches, *args, **kwargs):
        made.append(batches)
        metrics = real(model, batches, *args, **kwargs)
        if len(made) == 38:
            return metrics._replace(loss=metrics.loss * 100)
        return metrics._replace(skipped=metrics.skipped + 1) if len(made) == 12 else metrics

    monkeypatch.setattr(start, "train_step", step)
    config = load_config("text_demo", [*overrides, "accumulate=4"])
    with caplog.at_level(logging.WARNING):
        pretrain(config)
    found = lines(tmp_path / "run")
    assert [row["update"] for row in found] == [12, 38]
    data = build_data(config.data, config.model, config.seed)
    for row in found:
        again = [data.load(one["epoch"], one["index"], tuple(one["items"])) for one in row["batches"]]
        had = made[row["update"] - 1]
        assert all(
            torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask) for a, b in zip(again, had, strict=True)
        )
        assert len({one["epoch"] for one in row["batches"]}) == 2
