"""The convergence check: the arms agree where they must, and the report sees where they do not."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import INTERPRET
from scipy import stats
from tiny import NO_DROPOUT, tiny_config

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import convergence
import convergence_arms
import convergence_report
from convergence_data import Prepared

from d2v_fast.train.graph import WARM_UP, CapturedStep
from d2v_fast.train.optim import OptimConfig, ScheduleConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODALITIES = ["speech", "image", "text"]
UPDATES, SEEDS, BATCH = 20, (1, 2), 3
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or INTERPRET, reason="of the CPU's reference; the benchmark itself runs on a GPU"
)


def made_up(modality):
    """Random items in random batches, a tiny model, no dropout; LayerDrop for speech."""
    config = tiny_config(modality, **NO_DROPOUT | ({"layerdrop": 0.4} if modality == "speech" else {}))
    settings = {
        "model": asdict(config),
        "optim": asdict(OptimConfig(lr=2e-3, clip_norm=1.0)),
        "schedule": asdict(ScheduleConfig(kind="cosine", warmup_updates=4)),
        "seeds": SEEDS,
        "updates": UPDATES,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    if modality == "text":
        settings["model"]["frontend"]["dropout"] = 0.0
    rng, count = np.random.default_rng(0), 8
    size, positions = {
        "speech": (8000, config.frontend.num_frames(8000) if modality == "speech" else 0),
        "image": (24, 36),
        "text": (21, 21),
    }[modality]
    arrays = {}
    for part in ("pretrain", "train", "test"):
        items = {
            "speech": {
                "samples": rng.integers(-3000, 3000, 2 * count * size).astype(np.int16),
                "first": 2 * size * np.arange(count),
                "mean": np.zeros(count),
                "std": np.full(count, 0.05),
            },
            "image": {"pixels": rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)},
            "text": {"ids": rng.integers(4, 49, (count, size)).astype(np.uint16)},
        }[modality]
        items |= {"labels": np.arange(count) % 2, "lengths": np.full(count, size)}
        arrays |= {f"{part}.{name}": x for name, x in items.items()}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = np.full(BATCH, positions)
        masks = [np.packbits(config.mask.draw(rng, lengths, positions)) for _ in range(UPDATES)]
        plan = {
            "items": rng.integers(count, size=UPDATES * BATCH),
            "starts": rng.integers(size, size=UPDATES * BATCH),
            "sizes": np.full(UPDATES, size),
            "counts": np.full(UPDATES, BATCH),
            "bytes": np.array([len(mask) for mask in masks]),
            "masks": np.concatenate(masks),
        }
        arrays |= {f"seed{seed}.{name}": x for name, x in plan.items()}
    return Prepared(arrays, json.loads(json.dumps(settings)), "d")


@pytest.fixture(scope="module")
def prepared():
    return {modality: made_up(modality) for modality in MODALITIES}


@pytest.fixture(scope="module")
def files(prepared, tmp_path_factory):
    """The folder that ``run`` reads."""
    folder = tmp_path_factory.mktemp("prepared")
    for modality in MODALITIES:
        prepared[modality].save(folder / f"{modality}.npz")
    return folder


@pytest.fixture(scope="module")
def runs(prepared):
    """All runs of all modalities, as ``convergence.py run`` writes them."""
    keys = ((modality, seed, arm) for modality in MODALITIES for seed in SEEDS for arm in convergence.ARMS)
    return {key: convergence_arms.run(prepared[key[0]], key[2], key[1], UPDATES) for key in keys}


def written(folder, runs, name="runs.json", commit="abc"):
    convergence._write(folder / name, runs, commit)
    return str(folder / name)


@on_cpu
@pytest.mark.parametrize("modality", MODALITIES)
def test_arms_agree(runs, modality):
    """Update by update, and in the weights that the probe reads; only one of them uses our operators."""
    for seed in SEEDS:
        plain, fused = (runs[modality, seed, arm] for arm in convergence.ARMS)
        assert plain["exact"] and fused["exact"]
        for name in convergence_arms.METRICS:
            assert len(fused["curves"][name]) == UPDATES
            np.testing.assert_allclose(fused["curves"][name], plain["curves"][name], rtol=1e-4, err_msg=name)
        assert not any(op.startswith("d2v_fast") for op in plain["ops"])
        assert {"d2v_fast::adamw_ema_", "d2v_fast::data2vec_loss_fwd"} <= set(fused["ops"])
        assert [row["name"] for row in fused["probe"]] == ["pretrained", "untrained"]
    assert runs[modality, 1, "plain"]["curves"]["loss"] != runs[modality, 2, "plain"]["curves"]["loss"]


@on_cpu
@pytest.mark.parametrize("modality", ["image", "text"])
def test_graphs_with_fixed_shapes_agree(prepared, runs, monkeypatch, modality):
    """A replay stands for that of a graph; rows that only fill up change nothing."""
    made = []

    def record(body):
        result = torch.zeros(6)
        return lambda: result.copy_(body()), result

    def captured(*args, **options):
        made.append(CapturedStep(*args, **options, record=record))
        return made[-1]

    monkeypatch.setattr(convergence_arms, "CapturedStep", captured)
    found = convergence_arms.run(prepared[modality], "fused", 1, UPDATES, graph="on")
    assert found["cuda_graph"] and made[0].replays == UPDATES - WARM_UP
    for name, values in runs[modality, 1, "plain"]["curves"].items():
        np.testing.assert_allclose(found["curves"][name], values, rtol=1e-4, err_msg=name)


@on_cpu
def test_report_of_equal_arms(runs, tmp_path, capsys):
    image = tmp_path / "img" / "convergence.png"
    assert convergence.main(["report", written(tmp_path, runs), "--seeds", "2", "--img", str(image)]) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 9 and "FAILED" not in out
    assert image.stat().st_size > 10_000


@on_cpu
@pytest.mark.parametrize(
    ("modality", "fault"), [("text", "loss"), ("image", "loss"), ("text", "ema"), ("speech", "ema")]
)
def test_report_sees_a_planted_fault(prepared, runs, tmp_path, capsys, modality, fault):
    """The loss scaled by 1.01, or decays 1 % lower, in the fused arm."""
    settings = deepcopy(prepared[modality].settings)
    model = settings["model"]
    if fault == "loss":
        model["loss"]["scale"] = 1.01 * model["encoder"]["dim"] ** -0.5
    else:
        model["ema"] |= {name: 0.99 * model["ema"][name] for name in ("decay", "end_decay")}
    faulty = Prepared(prepared[modality].arrays, settings, prepared[modality].digest)
    changed = {key: run for key, run in runs.items() if key[0] == modality}
    for seed in SEEDS:
        changed[modality, seed, "fused"] = convergence_arms.run(faulty, "fused", seed, UPDATES)
    assert convergence.main(["report", written(tmp_path, changed), "--seeds", "2"]) == 1
    assert f"FAILED    {modality:6} beginning" in capsys.readouterr().out


def synthetic(seeds=3, updates=200, exact=False, **fused):
    """Runs of one modality as curves that fall to a level of the seed; ``fused`` changes those of that arm."""
    found = {}
    for seed in range(1, seeds + 1):
        for arm in convergence.ARMS:
            rng = np.random.default_rng([seed, arm == "fused"])
            level = 2 + 0.02 * np.random.default_rng(seed).standard_normal()
            loss = level + 3 * np.exp(-np.arange(updates) / 40) + 0.005 * rng.standard_normal(updates)
            accuracy = 0.8 + 0.01 * rng.standard_normal()
            if arm == "fused":
                loss, accuracy = fused.get("loss", lambda x: x)(loss), accuracy + fused.get("accuracy", 0.0)
            rows = (("pretrained", accuracy), ("untrained", 0.5))
            found["text", seed, arm] = {
                "modality": "text", "seed": seed, "arm": arm, "updates": updates, "data": "d", "exact": exact,
                "precision": "bf16" if arm == "fused" else "fp32", "seconds": 1.0,
                "ops": ["d2v_fast::l2_norm"] if arm == "fused" else [],
                "curves": {"loss": [x if np.isfinite(x) else None for x in loss.tolist()]},
                "probe": [{"name": n, "test_accuracy": a, "test_stderr": 0.01} for n, a in rows],
            }  # fmt: skip
    return found


def at(values, part, change):
    """``values`` with ``change`` applied to those from ``part`` of them on."""
    values = values.copy()
    values[int(part * len(values)) :] = change(values[int(part * len(values)) :])
    return values


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"accuracy": 0.1}, []),  # a better probe is no fault
        ({"loss": lambda x: at(x, 0.5, lambda y: y + 0.5)}, ["final loss"]),
        ({"loss": lambda x: at(x, 0.5, lambda y: y - 0.5)}, ["final loss"]),
        ({"loss": lambda x: 1.01 * x}, ["beginning"]),  # the same final loss, as far as that can be told
        ({"loss": lambda x: at(x, 0.5, lambda y: 1.03 * y)}, ["final loss"]),
        ({"loss": lambda x: at(x, 0.99, lambda y: y * np.nan)}, ["loss"]),
        ({"accuracy": -0.1}, ["probe"]),
        ({"exact": True}, ["beginning"]),  # what noise hides otherwise
    ],
)
def test_verdict(tmp_path, capsys, changes, failed):
    code = convergence.main(["report", written(tmp_path, synthetic(**changes))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(maxsplit=2)[2] for line in lines if line.startswith("FAILED")] == failed
    assert code == (1 if failed else 0)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.0, 0.0, 0.0), "ok"),
        ((0.010, 0.011, 0.012), "ok"),  # on one side of 0, and more than 2 % is excluded
        ((0.018, 0.020, 0.022), "FAILED"),  # of 1: reaches beyond 2 %
        ((-0.018, -0.020, -0.022), "FAILED"),
        ((-0.02, 0.0, 0.02), "undecided"),  # 0 +- 5 %
        ((0.0, 0.01, 0.02), "undecided"),  # 1 +- 2.5 %
    ],
)
def test_final_losses_in_pairs(differences, verdict):
    """The seeds themselves are far apart, which says nothing about the arms."""
    plain = np.array([[0.5] * 20, [1.0] * 20, [1.5] * 20])
    check = convergence_report._final(plain, plain + np.array(differences)[:, None])
    assert check.verdict == verdict, check.text


def test_interval_of_pairs():
    """As SciPy's paired t-test has it."""
    rng = np.random.default_rng(0)
    plain = 3 + rng.standard_normal((5, 1))
    fused = plain + 0.01 * rng.standard_normal((5, 1))
    low, high = stats.ttest_rel(fused[:, 0], plain[:, 0]).confidence_interval(0.95)
    said = f"between {100 * low / plain.mean():+.2f} % and {100 * high / plain.mean():+.2f} % with 95%"
    assert said in convergence_report._final(plain, fused).text


def test_undecided_is_neither_status(tmp_path, capsys):
    runs = synthetic()
    for seed, factor in ((1, 0.9), (2, 1.0), (3, 1.1)):
        curves = runs["text", seed, "fused"]["curves"]
        curves["loss"] = at(np.array(curves["loss"]), 0.5, lambda y, f=factor: f * y).tolist()
    assert convergence.main(["report", written(tmp_path, runs)]) == 3
    assert "undecided text   final loss" in capsys.readouterr().out


def test_standard_error():
    """Against the textbook's: three seeds each, deviations 1 and 2."""
    a, b = np.array([-1.0, 0.0, 1.0]), np.array([1.0, 3.0, 5.0])
    assert convergence_report.standard_error(a, b) == pytest.approx(np.sqrt((1 + 4) / 3))


def without(*keys):
    return lambda runs: [runs.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(("text", 2, "fused")), r"text: both arms must have the same seeds; fused lacks \[2\]"),
        (without(("text", 3, "plain"), ("text", 3, "fused")), r"text: there must be at least 3 seeds, got \[1, 2\]"),
        (lambda r: r["text", 1, "plain"].update(updates=100), "text: runs must have the same updates"),
        (lambda r: r["text", 1, "fused"].update(data="e"), "text: runs must have the same data"),
        (lambda r: r["text", 1, "plain"].update(ops=["d2v_fast::pos_conv"]), "must use no operator of ours"),
        (lambda r: r["text", 1, "fused"].update(ops=[]), "the fused arm must use operators of ours"),
        (lambda r: r.clear(), "no runs in"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, change, message):
    runs = synthetic()
    change(runs)
    with pytest.raises(ValueError, match=message):
        convergence_report.load([written(tmp_path, runs)], 3)


def test_files_that_do_not_belong_together(tmp_path):
    runs = synthetic()
    files = [written(tmp_path, runs, "a.json"), written(tmp_path, runs, "b.json")]
    with pytest.raises(ValueError, match=r"b.json: text, seed 1, fused is there twice"):
        convergence_report.load(files, 3)
    half = dict(islice(runs.items(), 4))
    files = [
        written(tmp_path, half, "a.json"),
        written(tmp_path, {k: runs[k] for k in runs.keys() - half}, "b.json", "x"),
    ]
    with pytest.raises(ValueError, match="must be of one commit, got abc, x"):
        convergence_report.load(files, 3)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(SystemExit, match="must be a file of convergence"):
        convergence.main(["report", str(tmp_path / "c.json")])
    with pytest.raises(SystemExit, match=r"seeds must be at least 2, .* got 1"):
        convergence.main(["report", files[0], "--seeds", "1"])


def test_what_was_not_prepared(prepared, tmp_path):
    text = prepared["text"]
    with pytest.raises(ValueError, match=r"seed must be one of those prepared, \[1, 2\], got 7"):
        text.batches(7, 1)
    with pytest.raises(ValueError, match=f"updates must be from 1 to the {UPDATES} prepared, got 21"):
        text.batches(1, 21)
    with pytest.raises(ValueError, match="arm must be one of plain, fused, got 'both'"):
        convergence_arms.run(text, "both", 1, 2)
    (tmp_path / "text.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"text.npz must be a file of convergence.py prepare"):
        Prepared.load(tmp_path / "text.npz")
    with pytest.raises(SystemExit, match=r"must hold speech.npz: run convergence.py prepare first"):
        convergence.main(["run", "--data", str(tmp_path), "--json", str(tmp_path / "x.json")])


def test_finished_runs_are_not_repeated(files, tmp_path, monkeypatch, capsys):
    """Of the same commit, data and settings; a run that fails is named, and the others are kept."""
    made = []

    def apart(args, key, commit):
        made.append(key)
        if key == ("text", 2, "fused"):
            return None, "broken"
        digest = Prepared.load(args.data / f"{key[0]}.npz").digest
        run = synthetic(seeds=2)[("text", *key[1:])]
        return run | {"data": digest, "updates": args.updates, "asked": [args.precision, args.graph]}, ""

    monkeypatch.setattr(convergence, "_run_apart", apart)
    file = tmp_path / "runs.json"
    command = ["run", "--data", str(files), "--json", str(file), "--modality", "text", "--seed", "1", "2"]
    command += ["--updates", "20", "--jobs", "2", "--commit"]
    assert convergence.main([*command, "abc"]) == 1
    assert "text, seed 2, fused failed:\nbroken" in capsys.readouterr().out
    assert len(made) == 4 and len(json.loads(file.read_text())["runs"]) == 3
    assert convergence.main([*command, "abc"]) == 1
    assert made[4:] == [("text", 2, "fused")] and "3 of 4 runs are there" in capsys.readouterr().out
    for changed in ([*command, "def"], [*command, "abc", "--precision", "bf16"], [*command, "abc-dirty"]):
        made.clear()
        convergence.main(changed)
        assert len(made) == 4


def test_runs_that_nobody_collected_are_kept(files, tmp_path, monkeypatch, capsys):
    """The collecting process was ended first; a file of another device is not continued, nor written over."""
    file, key = tmp_path / "runs.json", ("text", 1, "plain")
    digest = Prepared.load(files / "text.npz").digest
    run = synthetic()[key] | {"data": digest, "updates": 20, "asked": ["auto", "auto"]}
    convergence._write(convergence._part(file, key), {key: run}, "abc")
    monkeypatch.setattr(convergence, "_run_apart", lambda *_: (None, "broken"))
    command = ["run", "--data", str(files), "--json", str(file), "--modality", "text", "--seed", "1"]
    command += ["--updates", "20", "--commit", "abc"]
    assert convergence.main(command) == 1
    assert "1 of 2 runs are there" in capsys.readouterr().out
    assert [one["arm"] for one in json.loads(file.read_text())["runs"]] == ["plain"]
    assert not convergence._part(file, key).parent.exists()
    monkeypatch.setattr(convergence, "_run_apart", lambda args, key, commit: (run | {"arm": "fused"}, ""))
    assert convergence.main(command) == 0
    assert [one["arm"] for one in json.loads(file.read_text())["runs"]] == ["fused", "plain"]
    text = file.read_text()
    file.write_text(text.replace('"device": "', '"device": "another '))
    with pytest.raises(SystemExit, match="has runs of device another"):
        convergence.main(command)


def test_budget_begins_no_run_that_would_outlast_it(files, tmp_path, monkeypatch, capsys):
    runs = synthetic(seeds=2)
    digest = Prepared.load(files / "text.npz").digest
    clock = [0.0]

    def apart(args, key, commit):
        clock[0] += 40
        return runs[key] | {"data": digest, "updates": 20, "asked": ["auto", "auto"]}, ""

    monkeypatch.setattr(convergence, "_run_apart", apart)
    monkeypatch.setattr(convergence.time, "monotonic", lambda: clock[0])
    command = [
        "run",
        "--data",
        str(files),
        "--json",
        str(tmp_path / "runs.json"),
        "--modality",
        "text",
        "--seed",
        "1",
        "2",
    ]
    assert convergence.main([*command, "--updates", "20", "--commit", "abc", "--budget", "100"]) == 3
    assert "no time left for 2 runs, of 40 s each: text, seed 2, plain" in capsys.readouterr().out
    assert convergence.main([*command, "--updates", "20", "--commit", "abc", "--budget", "100"]) == 0
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 4


@on_cpu
def test_run_needs_no_train_extra(files, tmp_path):
    """As on a machine that lacks what reads configurations, audio, images and text."""
    arguments = ["run", "--alone", "--data", str(files), "--json", str(tmp_path / "x.json")]
    arguments += ["--modality", "speech", "--seed", "1", "--arm", "fused", "--updates", "2"]
    code = (
        "import sys\n"
        "for name in ('pydantic', 'yaml', 'omegaconf', 'soundfile', 'soxr', 'kornia', 'PIL', 'tokenizers',\n"
        "             'safetensors', 'typer', 'rich', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import convergence\n"
        f"sys.exit(convergence.main({arguments!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"][0]["curves"]["loss"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("modality", MODALITIES)
def test_arms_agree_on_a_gpu(prepared, modality):
    """bfloat16, CUDA graphs where LayerDrop does not forbid them, kernels."""
    plain, fused = (convergence_arms.run(prepared[modality], arm, 1, UPDATES) for arm in convergence.ARMS)
    assert fused["precision"] == "bf16" and fused["cuda_graph"] == (modality != "speech")
    ratios = np.array(fused["curves"]["loss"]) / np.array(plain["curves"]["loss"])
    assert abs(ratios.mean() - 1) <= 2 * convergence_report.CLOSE
    assert any(op.startswith("d2v_fast") for op in fused["ops"]) and not any(
        op.startswith("d2v_fast") for op in plain["ops"]
    )
