"""Whole ``fairseq-hydra-train`` runs of data2vec on real speech and text, with and without ``d2v-fast run``.

data2vec 1.0 for both, 2.0 for speech. Run by ``make test-integration`` and ``make ci``, not by ``make test``: fifteen
runs of 30 or 10 updates.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import soundfile
import torch

pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")

from d2v_fast.demo.fetch import DemoSet, FetchError, fetch

pytestmark = pytest.mark.timeout(1800)
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BIN = Path(sys.executable).parent
UPDATES, MIDDLE = 30, 20
TOLERANCE = 1e-4

COMMON = {
    "common.user_dir": HERE / "d2v_user",
    "common.fp16": "false",
    "++common.cpu": "true",
    "common.log_interval": 1,
    "common.log_format": "simple",
    "common.tensorboard_logdir": "",
    "distributed_training.distributed_world_size": 1,
    "distributed_training.ddp_backend": "no_c10d",
    "++dataset.num_workers": 0,
    "++dataset.disable_validation": "true",
    "optimization.lr": "[0.0005]",
    "optimization.update_freq": "[1]",
    "optimization.max_update": UPDATES,
    "checkpoint.no_epoch_checkpoints": "true",
    "checkpoint.save_interval_updates": MIDDLE,
    "checkpoint.keep_interval_updates": -1,
}
SPEECH = {
    "dataset.max_tokens": 200_000,
    "task.max_sample_size": 64_000,
    "task.min_sample_size": 16_000,
    "lr_scheduler.phase_ratio": "[0.03,0.9,0.07]",
    "++model.encoder_layers": 4,
    "++model.encoder_embed_dim": 64,
    "++model.encoder_ffn_embed_dim": 128,
    "++model.encoder_attention_heads": 4,
    "++model.conv_feature_layers": '"[(32,10,5)]+[(32,3,2)]*4+[(32,2,2)]*2"',
    "model.average_top_k_layers": 2,
    "++model.ema_anneal_end_step": 10,
    # LayerDrop stays on: the same layers are left out if no thread that loads batches draws numbers in between
    "dataset.data_buffer_size": 0,
    "++model.dropout": 0,
    "++model.attention_dropout": 0,
}
TEXT = {
    "dataset.max_tokens": 1024,
    "task.tokens_per_sample": 128,
    "++task.sample_break_mode": "none",
    "lr_scheduler.warmup_updates": 5,
    "model.head_layers": 1,
    "model.average_top_k_layers": 2,
    "model.ema_anneal_end_step": 10,
    "model.transformer.max_source_positions": 128,
    "model.transformer.dropout": 0,
    "model.transformer.attention_dropout": 0,
    "model.transformer.encoder.layers": 4,
    "model.transformer.encoder.embed_dim": 64,
    "model.transformer.encoder.ffn_embed_dim": 128,
    "model.transformer.encoder.attention_heads": 4,
    "++model.transformer.decoder.input_dim": 64,
    "++model.transformer.decoder.output_dim": 64,
}
SPEECH_2 = {
    "dataset.max_tokens": 200_000,
    "dataset.data_buffer_size": 0,  # masks and LayerDrop: as for data2vec 1.0
    "task.max_sample_size": 64_000,
    "task.min_sample_size": 16_000,
    "lr_scheduler.warmup_updates": 5,
    "model.depth": 4,
    "model.embed_dim": 64,
    "++model.num_heads": 4,
    "model.clone_batch": 3,
    "model.average_top_k_layers": 2,
    "model.ema_anneal_end_step": 10,
    "++model.encoder_dropout": 0,
    "++model.post_mlp_drop": 0,
    "++model.attention_dropout": 0,
    "model.modalities.audio.feature_encoder_spec": '"[(32,10,5)]+[(32,3,2)]*4+[(32,2,2)]*2"',
    "model.modalities.audio.prenet_depth": 1,
    "model.modalities.audio.prenet_dropout": 0,
    "model.modalities.audio.decoder.input_dropout": 0,
    "model.modalities.audio.decoder.decoder_dim": 32,
}
RECIPES = {
    "speech": ("audio/pretraining", "base_librispeech", SPEECH),
    "text": ("text/pretraining", "base", TEXT),
    "speech2": ("v2", "base_audio_only_task", SPEECH_2),
}


@dataclass
class Run:
    """What a run left behind."""

    folder: Path
    stderr: str
    logged: dict[str, list[float]] = field(default_factory=dict)  # by name, one value an update
    used: dict = field(default_factory=dict)  # calls, fallbacks and left of a patched run

    def checkpoint(self, update: int | None = None) -> Path:
        name = "last" if update is None else f"*_{update}"
        (found,) = (self.folder / "checkpoints").glob(f"checkpoint_{name}.pt")
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's, the teacher's (``_ema``) among them, and the optimizer's."""
        state = torch.load(self.checkpoint(), weights_only=False)
        assert state["optimizer_history"][-1]["num_updates"] == UPDATES
        yield from flat("model", state["model"])
        # the optimizer counts parameters in the order of the model, which has a buffer too
        moments = [moment for _, moment in sorted(state["last_optimizer_state"]["state"].items())]
        names = [name for name in state["model"] if "_ema" not in name and not name.endswith(".version")]
        assert [m["exp_avg"].shape for m in moments] == [state["model"][name].shape for name in names]
        yield from flat("optimizer", dict(zip(names, moments, strict=True)))


def flat(name: str, value) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{name}.{key}", inner)


def run_command(command: list, **environment) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr


def train(kind: str, data: Path, folder: Path, patched: bool, resume: Path | None = None) -> Run:
    import fairseq

    where, name, settings = RECIPES[kind]
    config = Path(fairseq.__file__).parent / "examples/data2vec/config" / where
    settings = {"hydra.run.dir": folder, "task.data": data, **COMMON, **settings}
    if resume is not None:
        settings["++checkpoint.restore_file"] = resume
    command = [BIN / "fairseq-hydra-train", "--config-dir", config, "--config-name", name]
    command += [f"{key}={value}" for key, value in settings.items()]
    record = folder.with_suffix(".jsonl")
    stderr = run_command([BIN / "d2v-fast", "run", *command] if patched else command, D2V_RECORD=str(record))
    result = Run(folder, stderr)
    for line in record.read_text().splitlines():
        row = json.loads(line)
        if "key" in row:
            result.logged.setdefault(row["key"], []).append(row["value"])
        else:
            result.used = row
    return result


def real_data(name: str) -> DemoSet:
    try:
        return fetch(name, ROOT / "data/demo")
    except FetchError as error:
        pytest.skip(f"no real data to train on: {error}")


def speech_data(folder: Path) -> Path:
    """A manifest of 40 clips of 2 to 6 s; clips of a batch are cropped to its shortest."""
    clips = real_data("speech").pretrain
    files = sorted(clips.rglob("*.wav"))[::50]
    frames = {path: soundfile.info(path).frames for path in files}
    rows = [f"{path.relative_to(clips)}\t{n}" for path, n in frames.items() if n < 6 * 16_000][:40]
    assert len(rows) == 40
    (folder / "train.tsv").write_text("\n".join([str(clips), *rows]) + "\n")
    return folder


def text_data(folder: Path) -> Path:
    """300 reviews, 2000 words."""
    (source,) = real_data("text").pretrain.glob("*.txt")
    (folder / "train.txt").write_text("\n".join(source.read_text().splitlines()[:300]) + "\n")
    command = [BIN / "fairseq-preprocess", "--only-source", "--trainpref", folder / "train.txt"]
    run_command([*command, "--destdir", folder / "bin", "--nwordssrc", 2000, "--workers", 1])
    return folder / "bin"


@pytest.fixture(scope="module", params=RECIPES)
def runs(request, tmp_path_factory) -> dict[str, Run]:
    """As written and patched: from the start, and from the other's checkpoint in the middle."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    data = {"speech": speech_data, "text": text_data, "speech2": speech_data}[kind](folder)
    found = {name: train(kind, data, folder / name, name == "patched") for name in ("written", "patched")}
    for before, after in (("written", "written"), ("written", "patched"), ("patched", "written")):
        middle = found[before].checkpoint(MIDDLE)
        name = f"{before}-{after}"
        found[name] = train(kind, data, folder / name, after == "patched", middle)
    return found


# what has to be in use, each at every update (the teacher has no step at the first)
IN_USE = {
    "speech": {
        "Data2VecAudioModel.forward": UPDATES,
        "Data2VecAudioModel.apply_mask": UPDATES,
        "ConvFeatureExtractionModel.forward": UPDATES,
        "ModelCriterion.forward": UPDATES,
        "EMAModule._step_internal": UPDATES - 1,
    },
    "text": {
        "Data2VecTextEncoder.forward": UPDATES,
        "ModelCriterion.forward": UPDATES,
        "EMAModule._step_internal": UPDATES - 1,
    },
    "speech2": {
        "Data2VecMultiModel.forward": UPDATES,
        "ModalitySpecificEncoder.contextualized_features": 2 * UPDATES,
        "ConvFeatureExtractionModel.forward": UPDATES,
        "ModelCriterion.forward": UPDATES,
        "EMAModule._step_internal": UPDATES - 1,
    },
}


def difference(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    """Of two tensors, relative to the norm of a third."""
    return ((ours.double() - theirs.double()).norm() / scale.double().norm()).item()


def assert_same(ours: Run, theirs: Run) -> None:
    """Every value that was logged and every tensor of the checkpoint."""
    assert ours.logged.keys() == theirs.logged.keys() >= {"loss", "gnorm"}
    for key, expected in theirs.logged.items():
        assert ours.logged[key] == pytest.approx(expected, rel=TOLERANCE), key
    found, expected = dict(ours.tensors()), dict(theirs.tensors())
    assert found.keys() == expected.keys()
    worst = {}
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            # the bias of keys has a gradient of 0 but for rounding: it is held against that of the queries
            scale = expected[name.replace("k_proj.bias", "q_proj.bias")]
            worst[name] = difference(found[name], tensor, scale)
        else:
            assert torch.equal(found[name], tensor), name
    name = max(worst, key=worst.get)
    print(f"{ours.folder.name} and {theirs.folder.name}: at most {worst[name]:.1e} ({name})")
    assert worst[name] <= TOLERANCE, name


def test_it_trains_and_nothing_else_is_patched(runs):
    written = runs["written"]
    assert len(written.logged["loss"]) == UPDATES and written.used == {}
    assert written.logged["loss"][-1] < 0.9 * written.logged["loss"][0]


def test_patched_run_is_the_same(runs):
    assert_same(runs["patched"], runs["written"])


def test_everything_was_in_use(runs, request):
    patched = runs["patched"]
    expected = IN_USE[request.node.callspec.params["runs"]]
    assert {name: patched.used["calls"].get(name) for name in expected} == expected
    assert patched.used["fallbacks"] == [] and patched.used["left"] == []
    for name in expected:
        assert name in patched.stderr  # the table


@pytest.mark.parametrize("name", ["written-patched", "patched-written"])
def test_resumed_by_the_other(runs, name):
    """From the middle on, against a run that was as written before and after it."""
    resumed, written = runs[name], runs["written-written"]
    assert len(resumed.logged["loss"]) == UPDATES - MIDDLE
    assert_same(resumed, written)
