"""Whole runs on each format of data: an interrupted and continued one ends where an uninterrupted one does."""

from dataclasses import replace

import pytest
from data_sets import clips, image
from test_data_binarized import sentences, write_folder
from test_data_tars import write_shards, write_tar
from tiny import tiny_config

from d2v_fast.train import pretrain
from d2v_fast.train.config import TrainConfig
from d2v_fast.train.data import ImageDataConfig, SpeechDataConfig, TextDataConfig


def data_and_model(kind, folder):
    """The configurations of a small set of one format."""
    if kind.startswith("data-bin"):
        model = tiny_config("text")
        write_folder(folder / "data-bin", sentences(120))
        data = TextDataConfig(
            path=str(folder / "data-bin"), batch_size=4, tokens_per_sample=16, break_mode=kind.partition(" ")[2]
        )
        return replace(model, frontend=replace(model.frontend, vocab_size=45)), data
    if kind == "jpg+cls":
        path = write_tar(folder / "images.tar", {f"{i}.jpg": image(i, "JPEG") for i in range(8)})
        return tiny_config("image"), ImageDataConfig(path=str(path), batch_size=4)
    lengths = {"max_tokens": 24_000, "min_seconds": 0.5, "max_seconds": 0.8}
    if kind == "parquet":
        from test_data_tables import pq, table

        pq.write_table(table(clips(8)), folder / "a.parquet")
        return tiny_config("speech"), SpeechDataConfig(path=str(folder / "a.parquet"), **lengths)
    shards = write_shards(folder / "shards", clips(8), "flac")
    return tiny_config("speech"), SpeechDataConfig(path=str(shards), cache_dir=str(folder / "cache"), **lengths)


@pytest.mark.parametrize("kind", ["data-bin eos", "data-bin complete_doc", "flac+json", "jpg+cls", "parquet"])
def test_resumed_runs_are_the_same(tmp_path, kind):
    model, data = data_and_model(kind, tmp_path)

    def run(out, **kwargs):
        out = str(tmp_path / out)
        config = TrainConfig(model=model, data=data, out=out, updates=5, log_every=1, workers=1, device="cpu", **kwargs)
        return pretrain(config)

    whole = run("whole")
    assert not run("parts", stop_after=2).finished
    assert run("parts").last_loss == whole.last_loss
