"""The order of batches, resuming, and what happens when items cannot be read."""

import itertools
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_fast.nn.batch import make_batch
from d2v_fast.train.data import DataError, PretrainData, UnreadableFile, batches, build_data
from d2v_fast.train.data.base import fixed_batches, list_files, relative_names
from d2v_fast.train.data.formats import find
from d2v_fast.train.errors import ConfigError


class Numbers(PretrainData):
    """Items 0 .. count - 1, of which ``broken`` cannot be read; a batch holds the items and a random number."""

    def contents(self):
        return [str(self.count).encode()]

    def __init__(self, count=10, broken=(), seed=0, batch_size=2):
        super().__init__(seed)
        self.count, self.broken, self.batch_size = count, broken, batch_size
        self.names = [f"item{i}" for i in range(count)]

    def plan(self, epoch):
        return fixed_batches(self.rng(self.ORDER, epoch), self.count, self.batch_size)

    def load(self, epoch, index, items):
        values, skipped = self.read_each(items, self._read)
        if not values:
            return None
        values.append(int(self.rng(self.CROP, epoch, index).integers(1 << 30)))
        return make_batch(torch.tensor(values)[:, None], np.ones((len(values), 1), bool), skipped=skipped)

    def _read(self, item):
        if item in self.broken:
            raise UnreadableFile(f"/folder/item{item}", "broken")
        return item

    def describe(self):
        return f"{self.count} numbers"


def take(data, count, **kwargs):
    return [(e, i, b.inputs[:, 0].tolist(), b.skipped) for e, i, b in itertools.islice(batches(data, **kwargs), count)]


@pytest.mark.parametrize("broken", [(), (1, 2, 5)])
def test_same_batches_for_any_number_of_workers(broken):
    alone = take(Numbers(broken=broken), 12)
    assert take(Numbers(broken=broken), 12, num_workers=2) == alone
    assert take(Numbers(broken=broken, seed=1), 12) != alone


def test_every_item_once_an_epoch_in_a_new_order():
    epochs = [
        [v for _, _, values, _ in group for v in values[:-1]]
        for _, group in itertools.groupby(take(Numbers(), 15), key=lambda t: t[0])
    ]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [0, 3, 5, 8])
def test_resuming_gives_the_batches_that_would_have_come(start):
    whole = take(Numbers(), 12)
    epoch, index = whole[start][:2]
    assert take(Numbers(), 12 - start, epoch=epoch, index=index) == whole[start:]


def test_random_streams_are_all_different():
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 1)))  # seed, stream, epoch, index
    first = [int(Numbers(seed=seed).rng(*key).integers(1 << 60)) for seed, *key in keys]
    assert len(set(first)) == len(keys)
    assert first == [int(Numbers(seed=seed).rng(*key).integers(1 << 60)) for seed, *key in keys]


def test_position_at_the_end_of_an_epoch_starts_the_next():
    assert take(Numbers(), 1, epoch=0, index=5) == take(Numbers(), 1, epoch=1)


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(Numbers(), 3, num_workers=1)
    take(Numbers(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_use_one_thread():
    class Threads(Numbers):
        def load(self, epoch, index, items):
            return make_batch(torch.tensor([[torch.get_num_threads()]]), np.ones((1, 1), bool))

    assert take(Threads(), 1, num_workers=1)[0][2] == [1]


def test_workers_survive_one_sigterm_and_every_sigint():
    class Signalled(Numbers):
        def load(self, epoch, index, items):
            for number in [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (), (signal.SIGTERM,)][index]:
                os.kill(os.getpid(), number)
            return super().load(epoch, index, items)

    data = Signalled()
    stream = batches(data, num_workers=1, prefetch=1)
    assert [next(stream)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"has ended .*(exited unexpectedly|killed by signal)"):
        next(stream)


# A worker gets stuck in a batch that nobody asks for, in native code, as at a lock that was held when it was forked.
STUCK = """
import ctypes, os, time
from test_data_base import Numbers, batches
main = os.getpid()
class Stuck(Numbers):
    def load(self, epoch, index, items):
        if index == 2 and os.getpid() != main:
            mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        return super().load(epoch, index, items)
stream = batches(Stuck(), num_workers=1, prefetch=4)
assert [next(stream)[1] for _ in range(2)] == [0, 1]
if {close}:
    stream.close()
    import multiprocessing
    end = time.monotonic() + 20
    while multiprocessing.active_children():
        assert time.monotonic() < end
        time.sleep(0.05)
print("ends", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the size of a mutex; fork")
@pytest.mark.parametrize("close", [True, False])
def test_a_worker_that_is_stuck_holds_nobody_up(close):
    """Neither who closes the stream, nor the end of the process."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.replace("{close}", str(close))],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.communicate(timeout=60)[0] == "ends\n" and process.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_broken_items_are_named(caplog):
    data = Numbers(broken=(3,))
    got = take(data, 10)
    assert [s for _, _, _, s in got if s] == [(("item3", "broken"),)] * 2
    assert [3 not in values[:-1] for _, _, values, _ in got] == [True] * 10
    assert [r.getMessage() for r in caplog.records] == ["skipped item3: broken"]  # once, not every epoch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_names_of_an_unreadable_batch_come_with_the_next_one(num_workers):
    data = Numbers()
    first, second = data.plan(0)[:2]
    got, following = take(Numbers(broken=first), 2, num_workers=num_workers)
    assert got[:2] == (0, 1) and got[2][:2] == list(second)
    assert got[3] == tuple((f"item{i}", "broken") for i in first) and following[3] == ()


def test_epoch_without_a_readable_batch_stops():
    # so few bad items that their share does not count
    with pytest.raises(DataError, match=r"nothing readable in epoch 0 of 10 numbers; last: item\d: broken"):
        take(Numbers(broken=range(10)), 1)
    # the rest of an epoch is not judged, the next whole one is
    middle = batches(Numbers(count=4, broken=range(4)), index=1)
    with pytest.raises(DataError, match="epoch 1"):
        next(middle)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_items_stop_the_run(num_workers):
    data = Numbers(count=200, broken=range(60, 80), batch_size=4)
    data.max_bad_fraction = 0.05  # 20 of 200 are broken; more than 10 end it at once
    with pytest.raises(DataError, match=r"11 of 200 items .* data.max_bad_fraction = 0.05; last: item\d\d: broken"):
        take(data, 60, num_workers=num_workers)
    data.max_bad_fraction = 0.11
    assert len(take(data, 150, num_workers=num_workers)) == 150


@pytest.mark.parametrize(("bad", "stops"), [(10, False), (11, True)])
def test_a_few_bad_items_of_few_do_not_stop_it(bad, stops):
    data = Numbers(count=40, broken=range(bad), batch_size=20)  # a quarter, however often they are read
    if stops:
        with pytest.raises(DataError, match=r"11 of 40 items could not be read \(27.50%\)"):
            take(data, 40)
    else:
        assert len(take(data, 40)) == 40


def test_empty_plan_stops():
    class Empty(Numbers):
        def plan(self, epoch):
            return []

    with pytest.raises(DataError, match="epoch 0 has no batches: 10 numbers"):
        take(Empty(), 1)


@pytest.mark.parametrize("name", ["epoch", "index", "num_workers", "prefetch"])
def test_bad_arguments(name):
    with pytest.raises(ConfigError, match=name):
        batches(Numbers(), **{name: -1})


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_bad_seed(seed):
    with pytest.raises(ConfigError, match="seed must be an integer >= 0"):
        Numbers(seed=seed)


def test_build_data_wants_a_data_config():
    with pytest.raises(TypeError, match=r"SpeechDataConfig.*got dict"):
        build_data({"path": "x"}, None, 0)


def test_augment_changes_nothing_by_default():
    batch = next(batches(Numbers()))[2]
    assert Numbers().augment(batch) is batch


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [4, 4]), (3, 4, [3]), (8, 4, [4, 4]), (1, 1, [1])])
def test_fixed_batches(count, size, sizes):
    got = fixed_batches(np.random.default_rng(0), count, size)
    assert [len(b) for b in got] == sizes
    assert len({i for b in got for i in b}) == sum(sizes)


def test_the_dropped_items_are_others_every_epoch():
    data = Numbers(count=11, batch_size=4)
    left = [set(range(11)) - {i for batch in data.plan(epoch) for i in batch} for epoch in range(20)]
    assert {len(items) for items in left} == {3} and set().union(*left) == set(range(11))


def test_list_files(tmp_path):
    for name in ("b.WAV", "a/c.wav", "a/deep/d.flac", ".hidden.wav", ".git/e.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}_linked"
    outside.mkdir()
    (outside / "f.wav").touch()
    (tmp_path / "linked").symlink_to(outside)
    files = list_files(tmp_path, (".wav", ".flac"), "audio")
    assert relative_names(tmp_path, files) == ["a/c.wav", "a/deep/d.flac", "b.WAV", "linked/f.wav"]
    assert relative_names(tmp_path / "b.WAV", list_files(tmp_path / "b.WAV", (".wav",), "audio")) == ["b.WAV"]


def test_list_files_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a folder with audio \(.wav\)"):
        list_files(tmp_path / "nowhere", (".wav",), "audio")
    with pytest.raises(DataError, match=r"holds no audio \(.wav\)"):
        list_files(tmp_path, (".wav",), "audio")


def test_packed_files_are_named_with_what_unpacks_them(tmp_path):
    for name in ("a.txt", "b.tgz", "c.tar.zip", "d.wav.gz", "e.tar.xz"):
        (tmp_path / name).touch()
    for suffix, words in (
        (".tar", "; b.tgz is compressed, which is not read: gunzip b.tgz"),
        (".wav", "; d.wav.gz is compressed, which is not read: gunzip d.wav.gz"),
        (".flac", ""),
    ):
        with pytest.raises(DataError) as refusal:
            list_files(tmp_path, (suffix,), "audio")
        assert str(refusal.value).endswith(f"holds no audio ({suffix}){words}")
    with pytest.raises(DataError, match=r"holds no audio \(\.tar\); e\.tar\.xz is compressed.*: unxz e\.tar\.xz"):
        find(str(tmp_path / "e.tar.xz"), {"webdataset": (".tar",)}, "auto", "train", "audio")
