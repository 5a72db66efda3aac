"""What a run counts between log steps, on one rank and over several, and what it must not do in between."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import make_batch
from d2v_fast.train.flops import batch_flops
from d2v_fast.train.gpus import peak_tflops
from d2v_fast.train.metrics import COLUMNS, Meter, combine, peak_memory

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Event:
    """A CUDA event whose times are the clock's; counts how often anybody waited."""

    clock: Clock
    made = waits = 0

    def __init__(self) -> None:
        type(self).made += 1

    def record(self) -> None:
        self.at = self.clock()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)

    def synchronize(self) -> None:
        type(self).waits += 1


def update(meter, clock, batches, wait=1.0, work=2.0, after=1.0) -> None:
    with meter.waiting():
        clock.now += wait
    meter.add(batches)
    with meter.working():
        clock.now += work
    clock.now += after


@pytest.mark.parametrize(
    ("modality", "rates"),
    [
        # 0.5 s clips give 24 frames each
        ("speech", {"audio_seconds_per_s": 2 * 3 * 0.5 / 8, "frames_per_s": 2 * 3 * 24 / 8}),
        ("image", {"images_per_s": 2 * 3 / 8}),
        ("text", {"tokens_per_s": 2 * 3 * 21 / 8}),
    ],
)
def test_one_window(modality, rates):
    """Two updates of 4 seconds each: 1 waiting, 2 working, 1 elsewhere."""
    clock, config = Clock(), tiny_config(modality)
    meter, batch = Meter(config, CPU, clock=clock), tiny_batch(config)
    for _ in range(2):
        update(meter, clock, [batch])
    record = meter.record([meter.take()])
    assert {name: record[name] for name in rates} == pytest.approx(rates)
    assert record["seconds_per_update"] == 4 and record["data_wait"] == 0.25 and record["host_seconds"] == 2
    assert record["masked_per_s"] == pytest.approx(2 * batch.num_masked / 8)
    assert record["tflop_per_s"] == pytest.approx(2 * batch_flops(config, batch) / 8 / 1e12)
    assert 0.5 < record["peak_memory"] / peak_memory(CPU) <= 1
    assert not {"mfu", "device_idle", "data_wait_worst"} & record.keys()  # nothing is known of a CPU, nor of ranks


def test_windows_are_apart():
    clock, config = Clock(), tiny_config("text")
    meter, batch = Meter(config, CPU, clock=clock), tiny_batch(config)
    clock.now += 50  # from its making to the first batch nothing is counted
    update(meter, clock, [batch, batch])
    first = meter.record([meter.take()])
    update(meter, clock, [batch, None], wait=3.0)  # a micro-batch of which nothing could be read
    second = meter.record([meter.take()])
    assert first["seconds_per_update"] == 4 and second["seconds_per_update"] == 6
    assert first["tokens_per_s"] * 4 == pytest.approx(2 * second["tokens_per_s"] * 6)
    assert second["data_wait"] == 0.5
    assert meter.record([meter.take()]) == {}


def test_padding_is_no_token():
    config = tiny_config("text")
    for batch in (tiny_batch(config, padded=True), tiny_batch(config)):
        clock = Clock()
        meter = Meter(config, CPU, clock=clock)
        update(meter, clock, [batch])
        tokens = batch.mask.numel() if batch.lengths is None else int((~batch.padding_mask).sum())
        assert meter.record([meter.take()])["tokens_per_s"] * 4 == tokens
    # rows that only fill up are neither tokens nor masked
    filled = make_batch(batch.inputs, batch.mask.numpy(), num_masked=batch.num_masked + 4, num_valid=batch.mask.numel())
    clock = Clock()
    meter = Meter(config, CPU, clock=clock)
    update(meter, clock, [filled])
    record = meter.record([meter.take()])
    assert record["tokens_per_s"] * 4 == tokens and record["masked_per_s"] * 4 == batch.num_masked


def test_ranks():
    """Rates are sums over ranks, shares and host time means, memory and the slowest loader the largest."""
    clock, config = Clock(), tiny_config("image")
    meter, batch = Meter(config, CPU, clock=clock), tiny_batch(config)
    update(meter, clock, [batch])
    one = meter.take()
    other = dict(zip(COLUMNS, one, strict=True)) | {"waited": 3.0, "worked": 1.0, "peak_memory": 1e15, "items": 6.0}
    record = meter.record([one, list(other.values())])
    assert record["images_per_s"] == 9 / 4
    assert (record["data_wait"], record["data_wait_worst"], record["host_seconds"]) == (0.5, 0.75, 1.5)
    assert record["peak_memory"] == 1e15
    assert record["tflop_per_s"] == meter.record([one])["tflop_per_s"]  # of each device


def test_mfu_is_of_all_devices_peaks():
    clock, config = Clock(), tiny_config("text")
    meter, batch = Meter(config, CPU, clock=clock), tiny_batch(config)
    update(meter, clock, [batch])
    one = dict(zip(COLUMNS, meter.take(), strict=True))
    rows = [list((one | {"peak_flops": peak}).values()) for peak in (1e6, 3e6)]
    assert meter.record(rows)["mfu"] == pytest.approx(2 * one["flops"] / 4 / 4e6)
    assert "mfu" not in meter.record([rows[0], list(one.values())])  # one of them is unknown


def test_device_time():
    """The device is busy from the first to the last operation of an update; nobody waits for it but take."""
    clock = Event.clock = Clock()
    Event.made = Event.waits = 0
    meter = Meter(tiny_config("text"), CPU, clock=clock, event=Event)
    batch = tiny_batch(meter.config)
    for _ in range(3):
        update(meter, clock, [batch])
        assert Event.waits == 0
    assert meter.record([meter.take()])["device_idle"] == pytest.approx(0.5)
    assert (Event.made, Event.waits) == (6, 1)
    update(meter, clock, [batch], wait=0.0, work=4.0, after=0.0)
    assert meter.record([meter.take()])["device_idle"] == 0.0
    assert (Event.made, Event.waits) == (6, 2)  # events are used again


def test_utilisation_is_asked_for_now_and_then():
    """At most once a second, and after a failure never again."""
    clock, asked = Clock(), []

    def utilisation() -> float:
        asked.append(clock.now)
        if len(asked) == 4:
            raise RuntimeError("no driver")
        return 60.0 + 10 * len(asked)

    meter = Meter(tiny_config("text"), CPU, clock=clock, utilisation=utilisation)
    batch = tiny_batch(meter.config)
    for _ in range(6):
        update(meter, clock, [batch], wait=0.25, work=0.25, after=0.0)
    assert asked == [100.5, 101.5, 102.5]  # behind an update
    assert meter.record([meter.take()])["gpu_idle"] == pytest.approx(1 - (0.7 + 0.8 + 0.9) / 3)
    for _ in range(4):
        update(meter, clock, [batch])
    assert len(asked) == 4 and "gpu_idle" not in meter.record([meter.take()])


def test_combine():
    rows = [[1.0, 2.0, 3.0, 4.0], [3.0, 6.0, 1.0, 0.0]]
    assert combine(rows, ["sum", "mean", "max", "min"]) == [4.0, 4.0, 3.0, 0.0]
    with pytest.raises(ValueError, match=r"rows must have 3 columns as how has, got 4"):
        combine(rows, ["sum"] * 3)
    with pytest.raises(ValueError, match=r"how must be of sum, mean, max, min, got 'median'"):
        combine(rows, ["sum", "mean", "max", "median"])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


def test_speech_with_padding_counts_what_is_heard():
    config = tiny_config("speech")
    clock, batch = Clock(), tiny_batch(config, padded=True)
    meter = Meter(config, CPU, clock=clock)
    update(meter, clock, [batch])
    share = int(batch.lengths.sum()) / batch.mask.numel()
    record = meter.record([meter.take()])
    assert record["audio_seconds_per_s"] * 4 == pytest.approx(3 * 0.5 * share)
    whole = replace(batch, lengths=None, padding_mask=None, valid=None, masked_in_valid=None)
    update(meter, clock, [whole])
    assert meter.record([meter.take()])["audio_seconds_per_s"] > record["audio_seconds_per_s"]
