"""The pieces of a run on several ranks that one process can show: environment, places of data, stand-ins, stopping."""

import itertools
import os
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_data_base import Numbers
from tiny import NO_DROPOUT, tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec, Data2VecConfig
from d2v_fast.train.data import batches
from d2v_fast.train.data.stand_in import stand_in
from d2v_fast.train.distributed import DistributedConfig, Ranks, join, read_environment, resolve_device, resolve_mode
from d2v_fast.train.errors import ConfigError, RankLost, TrainingStopped
from d2v_fast.train.interrupt import Interrupt
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.parallel import _mesh, compile_layers, parallelise
from d2v_fast.train.seeds import layerdrop_seed, seed_micro_batch
from d2v_fast.train.step import Counts, train_step
from d2v_fast.train.vote import Abandoned, Vote


def without_dropout(modality: str) -> Data2VecConfig:
    config = tiny_config(modality, **NO_DROPOUT)
    return replace(config, frontend=replace(config.frontend, dropout=0.0)) if modality == "text" else config


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_environment_of_torchrun():
    found = read_environment(TORCHRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 8, 1, 2)
    assert read_environment({}) is None
    assert read_environment({"WORLD_SIZE": "1"}) is None  # some clusters set it for every job


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"WORLD_SIZE": None}, "says RANK=3, .*but not WORLD_SIZE: start all ranks by torchrun"),
        ({"RANK": None, "MASTER_PORT": None}, "but not RANK, MASTER_PORT"),
        ({"RANK": "three"}, "RANK in the environment must be a number, got 'three'"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT in the environment must be a number"),
        ({"RANK": "8"}, "must be below WORLD_SIZE=8, got 8, 1"),
    ],
)
def test_incomplete_environments_are_refused(change, match):
    environment = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=match):
        read_environment(environment)


def test_modes():
    assert [resolve_mode("auto", size) for size in (1, 2)] == ["none", "ddp"] and resolve_mode("fsdp2", 1) == "fsdp2"
    with pytest.raises(ConfigError, match="must be ddp, fsdp2, hsdp or auto for 2 ranks, got none"):
        resolve_mode("none", 2)
    for settings, match in (({"timeout": 0}, "timeout must be"), ({"shard_size": -1}, "shard_size must be at least 0")):
        with pytest.raises(ValueError, match=match):
            DistributedConfig(**settings)


def test_devices_of_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", 1) == torch.device("cuda", 1) == resolve_device("cuda", 1)
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and resolve_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="must be auto, cpu or cuda with several ranks on a machine, got 'cuda:0'"):
        resolve_device("cuda:0", 1)
    with pytest.raises(ConfigError, match="cuda:2 was asked for, and there are 2 CUDA devices"):
        resolve_device("auto", 2)


def test_ranks_with_gpus_meet_over_nccl_and_talk_over_gloo(monkeypatch):
    """What is asked of PyTorch, without a GPU; after an error NCCL is not waited for."""
    for name, value in {**TORCHRUN, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: calls.update(backend=backend, **how))
    monkeypatch.setattr(dist, "new_group", lambda **how: how)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.update(destroyed=True))
    with pytest.raises(KeyError), join(DistributedConfig(timeout=90)) as ranks:
        assert ranks.mode == "ddp" and (ranks.rank, ranks.world_size) == (3, 8)
        assert ranks.control["backend"] == "gloo" and ranks.control["timeout"].total_seconds() == 90
        raise KeyError
    cuda = torch.device("cuda", 0)
    assert (calls["backend"], calls["device"], calls["device_id"], ranks.device) == ("nccl", cuda, cuda, cuda)
    assert calls["timeout"].total_seconds() == 90 and "destroyed" not in calls
    with join(DistributedConfig()):
        pass
    assert calls["destroyed"]

    def nobody_there(*args, **kwargs):
        raise dist.DistNetworkError("connection refused")

    monkeypatch.setattr(dist, "init_process_group", nobody_there)
    match = "rank 3 of 8 did not meet the others at node0:29500, with 600 s .*each step.*connection refused"
    with pytest.raises(ConfigError, match=match), join(DistributedConfig()):
        pass


def test_one_rank_alone():
    ranks = Ranks.alone()
    assert ranks.sum([1, 2]).read() == [1, 2] and ranks.exchange([0.5]) == [[0.5]] and ranks.gather("x") == ["x"]
    ranks.check_same("settings", {"a": 1})
    with pytest.raises(KeyError), ranks.together("looking"):
        raise KeyError("a")


def test_answers_of_others():
    """What other ranks say, without them."""

    class Others(Ranks):
        def gather(self, value):
            return [value, answer(value)]

    ranks = Others(0, 2, 0, 2, torch.device("cpu"))
    answer = lambda value: {**value, "seed": "2"}  # noqa: E731
    with pytest.raises(ConfigError, match=r"settings must be the same .*: seed: 1 on rank 0, 2 on rank 1$"):
        ranks.check_same("settings", {"seed": 1, "lr": 0.1})
    answer = lambda value: "no such folder"  # noqa: E731
    with pytest.raises(TrainingStopped, match="opening failed on rank 1: no such folder"), ranks.together("opening"):
        pass
    lost = pytest.raises(RankLost, match=r"rank 0 waited for x in vain, at most 600 s .*Connection closed")
    with lost, ranks.waiting("x"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    with pytest.raises(RankLost, match=r"in vain, at most 21600 s: a rank has ended"), ranks.waiting("x", 21600.0):
        raise RuntimeError("[gloo] no answer")
    with pytest.raises(RuntimeError, match="something else"), ranks.waiting("x"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_share_the_data_without_overlap_or_loss(world_size, num_workers):
    """Any number of ranks reads the sequence of one, each rank its own share, all from place to place."""
    rounds = 7
    want = [b.inputs[:, 0].tolist() for _, _, b in itertools.islice(batches(Numbers(), index=1), rounds * world_size)]
    places, found = set(), {}
    for rank in range(world_size):
        stream = batches(Numbers(), index=1, rank=rank, world_size=world_size, num_workers=num_workers)
        for number, (epoch, index, batch) in enumerate(itertools.islice(stream, rounds)):
            found[number * world_size + rank] = batch.inputs[:, 0].tolist()
            places.add((number, epoch, index))
        stream.close()
    assert [found[i] for i in range(rounds * world_size)] == want
    assert len(places) == rounds  # the same on all ranks
    _, epoch, index = sorted(places)[3]  # go on from there with another number of ranks
    again = next(batches(Numbers(), epoch=epoch, index=index + 1))[2].inputs[:, 0].tolist()
    assert again == want[4 * world_size]


def test_unread_batches_keep_their_place():
    kept = list(itertools.islice(batches(Numbers(broken=range(4)), index=1, keep_empty=True), 12))
    read = [one for one in kept if one[2] is not None]
    left = itertools.islice(batches(Numbers(broken=range(4)), index=1), len(read))
    assert 0 < len(read) < len(kept) == len({one[:2] for one in kept})
    for (*place, batch), (*other, same) in zip(read, left, strict=True):
        assert place == other and torch.equal(batch.inputs, same.inputs)
    with pytest.raises(ConfigError, match="rank must be from 0 to 1, got 2"):
        batches(Numbers(), rank=2, world_size=2)


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
@pytest.mark.parametrize("token_weighted", [True, False])
def test_stand_ins_change_nothing(modality, token_weighted):
    """An update with one is the update without it, metrics included."""
    config = without_dropout(modality)
    config = replace(config, loss=replace(config.loss, token_weighted=token_weighted))
    empty = stand_in(config)
    empty.check()
    assert empty.num_masked == 0
    results = []
    for extra in ([], [empty]):
        torch.manual_seed(0)
        model = Data2Vec(config)
        step = [*extra, tiny_batch(config, 1), tiny_batch(config, 2)]
        metrics = train_step(model, step, build_optimizer(model, OptimConfig(lr=1e-3)), lr=1e-3, update=0)
        results.append((metrics, [p.detach() for p in model.parameters()]))
    (want, parameters), (got, others) = results
    assert torch.stack(want[:5]).tolist() == pytest.approx(torch.stack(got[:5]).tolist(), rel=1e-6)
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-8) for p, q in zip(parameters, others, strict=True))


@pytest.fixture
def ctrl_c():
    """What Ctrl-C does unless it is ignored, as in whatever a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_votes(ctrl_c):
    config = tiny_config("text")
    with Interrupt() as interrupt:
        some, nothing = [tiny_batch(config)], [stand_in(config)]
        vote = Vote(Ranks.alone(), some + nothing, interrupt, False)
        assert vote.counts() == Counts(some[0].num_masked, 1) and not vote.stop
        with pytest.raises(Abandoned):
            Vote(Ranks.alone(), nothing, interrupt, False).counts()
        signal.raise_signal(signal.SIGTERM)
        vote = Vote(Ranks.alone(), some, interrupt, True)
        with pytest.raises(Abandoned):
            vote.counts()
        assert vote.failed and vote.stop and interrupt.requested and not interrupt.by_user
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested and interrupt.by_user
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_abandoned_updates_change_nothing():
    model = Data2Vec(tiny_config("text"))
    before = [p.detach().clone() for p in model.parameters()]

    def counts():
        raise Abandoned

    with pytest.raises(Abandoned):
        train_step(
            model, [tiny_batch(model.config)], build_optimizer(model, OptimConfig()), lr=1.0, update=0, counts=counts
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_draw_by_their_number_and_layers_by_the_update():
    drawn = {}
    for update, number in itertools.product(range(3), range(3)):
        seed_micro_batch(1, update, number)
        drawn[update, number] = torch.rand(4).tolist()
    assert len({tuple(x) for x in drawn.values()}) == 9
    model = Data2Vec(tiny_config("text", layers=8, **{**NO_DROPOUT, "layerdrop": 0.5})).train()
    kept = []
    for update in (0, 0, 1):
        torch.rand(update + 3)  # whatever else was drawn
        model.encoder.layerdrop_seed = layerdrop_seed(1, update)
        kept.append(model.encoder._kept_layers())
    assert kept[0] == kept[1] != kept[2]


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process, as a mode without torchrun makes it."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    with join(DistributedConfig(mode="fsdp2", timeout=30), "cpu") as ranks:
        yield ranks
    assert not dist.is_initialized()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_a_process_group_that_was_there_is_left_as_it_was(one_rank):
    """Also the threads of what the run added, which poll."""
    before = len(os.listdir("/proc/self/task"))
    for failure in (None, KeyError):
        with suppress(KeyError), join(DistributedConfig(mode="ddp"), "cpu") as ranks:
            assert ranks.gather(3) == [3] and len(os.listdir("/proc/self/task")) > before
            if failure:
                raise failure
        del ranks
        assert dist.is_initialized() and len(os.listdir("/proc/self/task")) == before
    assert one_rank.gather(4) == [4]


def test_a_sharded_model_of_one_rank(one_rank):
    """Averages move in their shards, and the front-end that the teacher shares is the student's after each update."""
    model = Data2Vec(tiny_config("text", **NO_DROPOUT))
    parallel = parallelise(model, one_rank)
    assert parallel.shards is not None and model.teacher.shares("frontend")
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, one_pass=True))
    for update in range(2):
        train_step(model, [tiny_batch(model.config)], optimizer, lr=1e-2, update=update, parallel=parallel)
    pairs = zip(model.frontend.parameters(), model.teacher.module["frontend"].parameters(), strict=True)
    assert all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs)
    student, teacher = (m.layers[0].fc1.weight.to_local() for m in (model.encoder, model.teacher.module["encoder"]))
    assert not torch.equal(student, teacher)
    assert one_rank.exchange([1.0, 2.0]) == [[1.0, 2.0]] and one_rank.gather(3) == [3]


@pytest.mark.parametrize("mode", ["fsdp2", "hsdp"])
def test_groups_of_a_mesh_wait_no_longer_than_the_run(one_rank, mode):
    mesh = _mesh(replace(one_rank, mode=mode), shard_size=0)
    groups = [mesh.get_group(name) for name in mesh.mesh_dim_names]
    waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    assert waits == [30.0] * (2 if mode == "hsdp" else 1)


def test_who_shares_parameters():
    """Ranks of a machine, or as many as are told; the first of each are replicas of each other, and so on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        ranks = Ranks(5, 8, 1, 4, torch.device("cpu"), mode="fsdp2")
        mesh = _mesh(ranks, 0)
        assert mesh.mesh_dim_names == ("shard",) and dist.get_process_group_ranks(mesh.get_group()) == list(range(8))
        for shard_size, replicas, shards in ((0, [1, 5], [4, 5, 6, 7]), (2, [1, 3, 5, 7], [4, 5]), (8, [5], range(8))):
            mesh = _mesh(replace(ranks, mode="hsdp"), shard_size)
            found = [dist.get_process_group_ranks(mesh.get_group(name)) for name in ("replicate", "shard")]
            assert found == [replicas, list(shards)] and mesh.shape == (len(replicas), len(shards))
        with pytest.raises(ConfigError, match="shard_size must divide the 8 ranks, got 3"):
            _mesh(replace(ranks, mode="hsdp"), 3)
    finally:
        dist.destroy_process_group()


def test_a_frozen_front_end_with_ddp(one_rank):
    """Parameters that never get a gradient are none that DDP waits for."""
    config = tiny_config("speech", **NO_DROPOUT)
    model = Data2Vec(replace(config, frontend=replace(config.frontend, feature_grad_mult=0.0)))
    parallel = parallelise(model, replace(one_rank, mode="ddp"))
    optimizer = build_optimizer(model, OptimConfig())
    for update in range(3):
        metrics = train_step(model, [tiny_batch(config)], optimizer, lr=1e-3, update=update, parallel=parallel)
        assert np.isfinite(metrics.loss.item())


@pytest.fixture
def dynamo():
    """Dynamo's settings, low; as they were afterwards, where monkeypatch would take them away."""
    low = {"recompile_limit": 2, "accumulated_recompile_limit": 3, "optimize_ddp": True}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**low, fail_on_recompile_limit_hit=True):
        yield torch._dynamo.config
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_compiled_layers_keep_names_and_results(monkeypatch):
    """With a compiler that only records: each layer of student and teacher, in place."""
    model = Data2Vec(tiny_config("image", **NO_DROPOUT)).eval()
    names = list(model.state_dict())
    batch = tiny_batch(model.config)
    with torch.no_grad():
        want = model(batch).loss
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(function) or function)
    compile_layers(model)
    with torch.no_grad():
        assert torch.equal(model(batch).loss, want)
    assert len(compiled) == 6 and list(model.state_dict()) == names


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), 1e12])
def test_time_outs_that_nobody_can_wait_for(timeout):
    with pytest.raises(ValueError, match=r"^distributed\.timeout must be above 0 and at most 2592000 seconds, got "):
        DistributedConfig(timeout=timeout)


def test_many_models_of_a_process_are_compiled(monkeypatch, dynamo):
    """PyTorch counts compilations of the code that they share, and runs it uncompiled after some, here two."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    small = tiny_config("image", **NO_DROPOUT)
    for heads in (1, 2):
        encoder = replace(small.encoder, heads=heads, dim=16 * heads, layers=1)
        model = Data2Vec(replace(small, encoder=encoder, targets=replace(small.targets, top_k=1))).eval()
        compile_layers(model)
        with torch.no_grad():
            model(tiny_batch(model.config))
    assert dynamo.accumulated_recompile_limit >= dynamo.recompile_limit and not dynamo.optimize_ddp
