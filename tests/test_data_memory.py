"""What the loader keeps while it reads: names in little memory, nothing that grows with the batches."""

import itertools
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_sets import RATE, clips, write_files

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data import SpeechDataConfig, batches, build_data
from d2v_fast.train.data.names import Names
from d2v_fast.train.data.packing import packed_batches

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cpu_loader

MODEL = Data2VecConfig.speech("base")


def test_names():
    given = ["a.flac", "", "ä/ö.wav", os.fsdecode(b"broken\xff.wav")]
    names = Names(given)
    assert list(names) == given and len(names) == 4 and names[3] == given[3]
    assert list(names.take([3, 0])) == [given[3], given[0]]
    assert list(pickle.loads(pickle.dumps(names))) == given
    assert list(Names.from_arrays(names.text, names.ends)) == given and list(Names()) == []
    for item in (4, -1):
        with pytest.raises(IndexError, match=f"name {item} of 4"):
            names[item]


def test_names_take_little_memory():
    tracemalloc.start()
    names = Names(f"speaker/chapter/utterance-{i:08d}.flac" for i in range(20_000))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 20_000 and kept < 20_000 * 55  # 38 bytes and an offset each; as strings over 90


def test_nothing_is_kept_of_batches(tmp_path):
    """The benchmark over 10,000 batches in small: objects of Python, whatever the allocator does."""
    write_files(tmp_path, clips(8), ".flac")
    config = SpeechDataConfig(path=str(tmp_path), max_tokens=RATE, min_seconds=0.5, max_seconds=0.6)
    stream = batches(build_data(config, MODEL, 0))
    tracemalloc.start()
    sizes = []
    for _ in range(4):
        for _ in itertools.islice(stream, 75):
            pass
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(sizes[1:]) - sizes[1] < 20_000  # less than a batch


def test_the_benchmark(tmp_path):
    """The loader benchmark runs, and its rate is far above what is asked for."""
    clips_folder = tmp_path / "clips"
    clips_folder.mkdir()
    assert 3 < cpu_loader.write_clips(clips_folder, 12, longest=4.0) < 12  # bits a sample: neither silence nor noise
    data = build_data(SpeechDataConfig(path=str(clips_folder)), MODEL, 0)
    assert cpu_loader.times_real_time(data) > cpu_loader.LEAST
    (first, before), *_, (last, after) = cpu_loader.memory(data, 40, workers=1)
    assert (first, last) == (4, 40) and min(before, after) > 2**20


def test_batches_are_packed_by_length():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    plan = packed_batches(np.random.default_rng(1), lengths, 300)
    assert sorted(itertools.chain(*plan)) == list(range(500))
    ordered = sorted(plan, key=lambda batch: (-max(lengths[list(batch)]), -min(lengths[list(batch)])))
    for batch, following in itertools.pairwise(ordered):
        longest = max(lengths[list(batch)])
        assert len(batch) * longest <= 300 < (len(batch) + 1) * longest
        assert min(lengths[list(batch)]) >= max(lengths[list(following)])
    assert plan != ordered
    alone = packed_batches(np.random.default_rng(1), np.array([500, 400]), 300)  # longer than what a batch may be
    assert sorted(alone) == [(0,), (1,)]
