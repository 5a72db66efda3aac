"""AdamWEMA against torch.optim.AdamW followed by the teacher's own step; saved states go both ways."""

import copy

import numpy as np
import pytest
import torch
from checks import DEVICE, no_synchronisation
from torch import nn

from d2v_fast.nn import EMATeacher
from d2v_fast.nn.config import EMAConfig
from d2v_fast.ops import clip_factor, l2_norm
from d2v_fast.optim import AdamWEMA

SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
HALF = EMAConfig(decay=0.5, end_decay=0.5, anneal_updates=0)


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(DEVICE)


def groups(model):
    """Weights decay, vectors do not; as in training."""
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]


def backward(model, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = None if name.startswith(without) and without else torch.randn(p.shape, generator=generator).to(DEVICE)


def same(a, b, rtol=2e-6, atol=2e-7):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol, msg=name)


def pair():
    """(model, AdamWEMA), its teacher; (model, AdamW), its teacher; all equal."""
    model, other = model_of(), model_of()
    teacher, follower = EMATeacher(model, HALF), EMATeacher(other, HALF)
    optimizer = AdamWEMA(groups(model), **SETTINGS, ema=teacher.averages())
    return (model, optimizer, teacher), (other, torch.optim.AdamW(groups(other), **SETTINGS, fused=True), follower)


def test_equals_adamw_and_the_teachers_step():
    (model, optimizer, teacher), (other, adamw, follower) = pair()
    for update in range(1, 11):
        for group, theirs in zip(optimizer.param_groups, adamw.param_groups, strict=True):
            group["lr"] = theirs["lr"] = 1e-3 * update
        backward(model, update), backward(other, update)
        norm = l2_norm([p.grad for p in model.parameters()])
        optimizer.step(grad_scale=clip_factor(norm, 0.3), ema_decay=0.5)
        nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        adamw.step()
        follower.update_(update)
    same(model, other), same(teacher.module, follower.module)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in adamw.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=2e-6, atol=2e-7, msg=key)


def test_parameters_without_gradient_stay_and_their_averages_follow():
    (model, optimizer, teacher), (other, adamw, follower) = pair()
    for update in range(1, 7):
        without = ("0.",) if update in (1, 4) else ()  # once before the first step of that layer
        backward(model, update, without), backward(other, update, without)
        kept, before = model[0].weight.clone(), teacher.module[0].weight.clone()
        optimizer.step(ema_decay=0.5)
        adamw.step()
        follower.update_(update)
        if without:
            assert torch.equal(model[0].weight, kept)
            assert update == 1 or not torch.equal(teacher.module[0].weight, before)
    same(model, other), same(teacher.module, follower.module)
    assert optimizer.state[model[0].weight]["step"].item() == 4.0
    assert optimizer.state[model[2].weight]["step"].item() == 6.0


def test_overflow_changes_nothing():
    (model, optimizer, teacher), _ = pair()
    backward(model, 1)
    optimizer.step(ema_decay=0.5)
    kept, kept_state = copy.deepcopy((model, teacher.module)), copy.deepcopy(optimizer.state_dict())
    backward(model, 2, without=("0.",))
    model[2].weight.grad.fill_(float("nan"))
    optimizer.step(found_inf=torch.tensor(1.0, device=DEVICE), ema_decay=0.5)
    same(model, kept[0], 0, 0), same(teacher.module, kept[1], 0, 0)
    for key, values in kept_state["state"].items():
        for name, value in values.items():
            assert torch.equal(optimizer.state_dict()["state"][key][name], value), name


def test_averages_are_left_alone_without_a_decay():
    (model, optimizer, teacher), _ = pair()
    kept = copy.deepcopy(teacher.module)
    for decay in (None, 1, 1.0):
        backward(model, 1)
        optimizer.step(ema_decay=decay)
    same(teacher.module, kept, 0, 0)
    assert not torch.equal(model[0].weight, kept[0].weight)
    optimizer.step(ema_decay=torch.tensor(0.0, device=DEVICE))
    same(teacher.module, model, 0, 0)


@pytest.mark.parametrize("fused", [True, False])
def test_states_go_both_ways(fused):
    """Three steps of one kind, then three of the other from its state: the same as six of one kind."""
    for first, second in ((AdamWEMA, torch.optim.AdamW), (torch.optim.AdamW, AdamWEMA)):
        straight, model = model_of(), model_of()
        extra = {} if first is AdamWEMA else {"fused": fused}
        steady, optimizer = first(groups(straight), **SETTINGS, **extra), first(groups(model), **SETTINGS, **extra)
        for update in range(6):
            if update == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = second(groups(model), lr=0.7)
                optimizer.load_state_dict(state)
                assert [g["lr"] for g in optimizer.param_groups] == [SETTINGS["lr"]] * 2
                assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
            backward(straight, update), backward(model, update)
            steady.step(), optimizer.step()
        same(straight, model)
        for p, q in zip(straight.parameters(), model.parameters(), strict=True):
            assert steady.state[p]["step"].item() == optimizer.state[q]["step"].item() == 6.0


def test_saved_state_is_that_of_fused_adamw():
    (model, optimizer, _), (other, adamw, _) = pair()
    backward(model, 1), backward(other, 1)
    optimizer.step(), adamw.step()
    ours, theirs = optimizer.state_dict(), adamw.state_dict()
    assert ours.keys() == theirs.keys()
    assert [g.keys() for g in ours["param_groups"]] == [g.keys() for g in theirs["param_groups"]]
    assert ours["param_groups"] == theirs["param_groups"]
    for key, values in theirs["state"].items():
        for name, value in values.items():
            mine = ours["state"][key][name]
            assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device), name


def test_copies_of_model_and_optimizer_go_on_alone():
    (model, optimizer, teacher), _ = pair()
    backward(model, 1)
    optimizer.step(ema_decay=0.5)
    model2, optimizer2, teacher2 = copy.deepcopy((model, optimizer, teacher))
    backward(model, 2), backward(model2, 2)
    optimizer2.step(ema_decay=0.5)
    assert not torch.equal(teacher2.module[0].weight, teacher.module[0].weight)
    optimizer.step(ema_decay=0.5)
    same(model, model2, 0, 0), same(teacher.module, teacher2.module, 0, 0)


def test_works_with_schedulers_closures_and_tensor_rates():
    model = model_of()
    optimizer = AdamWEMA(model.parameters(), lr=torch.tensor(1e-2, device=DEVICE))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    x = torch.randn(4, 6, device=DEVICE)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[0] > losses[1] > losses[2]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 / 8)


def test_groups_with_settings_of_their_own():
    model, other = model_of(), model_of()
    split = [
        [{"params": m[0].parameters(), "lr": 1e-3}, {"params": m[2].parameters(), "betas": (0.5, 0.9)}]
        for m in (model, other)
    ]
    optimizer, adamw = AdamWEMA(split[0], **SETTINGS), torch.optim.AdamW(split[1], **SETTINGS)
    for update in range(3):
        backward(model, update), backward(other, update)
        optimizer.step(), adamw.step()
    same(model, other)


def test_fairseq_eps():
    """One step from 0 with a large eps: the two places of eps differ as the formulas say."""
    changes = {}
    for mode in ("torch", "fairseq"):
        p = nn.Parameter(torch.zeros(1, device=DEVICE))
        p.grad = torch.full_like(p, 2.0)
        AdamWEMA([p], lr=0.1, betas=(0.9, 0.99), eps=1.0, weight_decay=0.0, eps_mode=mode).step()
        changes[mode] = p.item()
    assert changes["torch"] == pytest.approx(-0.1 * 2 / (2 + 1), rel=1e-6)
    assert changes["fairseq"] == pytest.approx(-0.1 * 0.1 / 0.1 * 0.2 / (0.2 + 1), rel=1e-6)


def test_sharded_parameters(tmp_path):
    """DTensors are updated by their local parts, and their states are DTensors as well."""
    from torch import distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        start, grad = torch.randn(6, 4), torch.randn(6, 4)
        plain = nn.Parameter(start.clone())
        sharded = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        average = distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)])
        plain.grad, sharded.grad = grad.clone(), distribute_tensor(grad, mesh, [Shard(0)])
        AdamWEMA([plain]).step()
        optimizer = AdamWEMA([sharded], ema={sharded: average})
        optimizer.step(ema_decay=0.0)
        assert torch.equal(sharded.to_local(), plain) and torch.equal(average.to_local(), plain)
        assert isinstance(optimizer.state[sharded]["exp_avg"], DTensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda m: AdamWEMA(m.parameters(), lr=-1.0), ValueError, "lr must be a number >= 0, got -1.0"),
        (lambda m: AdamWEMA(m.parameters(), betas=(0.9, 1.0)), ValueError, r"betas\[1\] must lie in \[0, 1\)"),
        (lambda m: AdamWEMA(m.parameters(), eps=-1.0), ValueError, "eps must be a number >= 0"),
        (lambda m: AdamWEMA(m.parameters(), weight_decay=-1.0), ValueError, "weight_decay.* must be a number >= 0"),
        (lambda m: AdamWEMA(m.parameters(), eps_mode="apex"), ValueError, "eps_mode must be one of"),
        (lambda m: AdamWEMA(m.parameters(), ema={torch.zeros(1): torch.zeros(1)}), ValueError, "got 1 tensors that"),
        (lambda m: AdamWEMA(m.half().parameters()), TypeError, "parameter 0 of group 0 must be a float32 master"),
        (
            lambda m: AdamWEMA([nn.Parameter(torch.ones(4, 6)[:, ::2])]),
            ValueError,
            "parameter 0 of group 0 must be dense",
        ),
        (lambda m: AdamWEMA([{"params": m.parameters(), "maximize": True}]), ValueError, "maximize must be False"),
        (lambda m: AdamWEMA([{"params": m.parameters(), "amsgrad": True}]), ValueError, "amsgrad must be False"),
        (lambda m: AdamWEMA([{"params": m.parameters(), "betas": (2, 3)}]), ValueError, r"betas\[0\] must lie in"),
        (lambda m: AdamWEMA(m.parameters(), lr="1"), TypeError, "lr must be a number, got str"),
        (lambda m: AdamWEMA(m.parameters()).step(found_inf=True), TypeError, "found_inf must be a tensor, got bool"),
        (lambda m: AdamWEMA(m.parameters()).step(ema_decay=1.5), ValueError, r"ema_decay must lie in \[0, 1\]"),
        (lambda m: AdamWEMA(m.parameters()).step(grad_scale=torch.ones(1)), ValueError, "grad_scale must have shape"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    model = model_of()
    backward(model, 0)
    with pytest.raises(error, match=match):
        call(model)


@pytest.mark.parametrize(
    "theirs,match",
    [
        (lambda ps: torch.optim.AdamW(ps, amsgrad=True), "amsgrad must be False, got True"),
        (lambda ps: torch.optim.AdamW(ps, maximize=True), "maximize must be False, got True"),
        (lambda ps: torch.optim.Adam(ps, weight_decay=0.1), "decoupled_weight_decay must be True, got False"),
    ],
)
def test_states_of_other_algorithms_are_refused(theirs, match):
    model = model_of()
    other = theirs(model.parameters())
    backward(model, 0)
    other.step()
    optimizer = AdamWEMA(model.parameters(), lr=0.7)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.7


def test_a_refused_group_is_not_added():
    model = model_of()
    optimizer = AdamWEMA(model[0].parameters())
    with pytest.raises(ValueError, match=r"betas\[0\] must lie in \[0, 1\), got 2"):
        optimizer.add_param_group({"params": model[2].parameters(), "betas": (2, 3)})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[2].parameters(), "lr": np.float32(0.25)})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "average,error,match",
    [
        (lambda p: torch.zeros(3), ValueError, r"ema of parameter 1 of group 0 must have shape .*\[5\]"),
        (lambda p: p.detach().half(), TypeError, "ema of parameter 1 of group 0 must be torch.float32 like"),
        (lambda p: p.detach().to("meta"), ValueError, "ema of parameter 1 of group 0 must have device"),
        (lambda p: None, TypeError, "ema of parameter 1 of group 0 must be a tensor, got NoneType"),
    ],
)
def test_averages_that_do_not_fit_are_refused_at_once(average, error, match):
    model = model_of()
    with pytest.raises(error, match=match):
        AdamWEMA(model.parameters(), ema={model[0].bias: average(model[0].bias)})


@pytest.mark.parametrize("broken", ["second group", "decay", "rate"])
def test_a_step_that_raises_changes_nothing(broken):
    model = model_of()
    teacher = EMATeacher(model, HALF)
    split = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = AdamWEMA(
        split, **SETTINGS, ema={p: e for p, e in teacher.averages().items() if p not in {*model[1].parameters()}}
    )
    kept = copy.deepcopy((model, teacher.module))
    backward(model, 0)
    decay = 0.5
    if broken == "second group":
        model[2].weight.data = torch.zeros(3, 10, device=DEVICE)[:, ::2]
        kept[0][2].weight.data.zero_()
    elif broken == "rate":
        optimizer.param_groups[1]["lr"] = -1.0
    else:
        decay = 1.5
    with pytest.raises(ValueError, match=r"must (be dense|be a number|lie in)"):
        optimizer.step(ema_decay=decay)
    same(model, kept[0], 0, 0), same(teacher.module, kept[1], 0, 0)
    assert not optimizer.state


def test_channels_last_parameters():
    """Kernels go through memory in its order, so that all tensors of a parameter must share that order."""

    def trained(memory_format):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 1, 3)).to(DEVICE, memory_format=memory_format)
        teacher = EMATeacher(model, HALF)
        optimizer = AdamWEMA(model.parameters(), **SETTINGS, ema=teacher.averages())
        for update in range(2):
            backward(model, update)  # contiguous gradients
            optimizer.step(ema_decay=0.5)
        fresh = AdamWEMA(model.parameters())
        state = copy.deepcopy(optimizer.state_dict())
        for values in state["state"].values():  # as saved by a contiguous model
            values["exp_avg"] = values["exp_avg"].contiguous()
        fresh.load_state_dict(state)
        backward(model, 2), fresh.step()
        return model, teacher.module

    for mine, want in zip(trained(torch.channels_last), trained(torch.contiguous_format), strict=True):
        assert mine[0].weight.is_contiguous(memory_format=torch.channels_last) and want[0].weight.is_contiguous()
        same(mine, want)


@pytest.mark.gpu
def test_captured_step_without_waiting():
    """A step under a CUDA graph, with rate, decay and flag on the device, equals one outside of it."""
    (model, optimizer, teacher), _ = pair()
    rate, decay, flag = (torch.tensor(x, device=DEVICE) for x in (2e-3, 0.5, 0.0))
    for group in optimizer.param_groups:
        group["lr"] = rate
    backward(model, 1)

    def step():
        norm = l2_norm([p.grad for p in model.parameters()])
        optimizer.step(grad_scale=clip_factor(norm, 0.3), found_inf=flag, ema_decay=decay)

    step()  # compiles and creates the state
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    model2, optimizer2, teacher2 = copy.deepcopy((model, optimizer, teacher))
    for update in (2, 3):
        for p, q in zip(model.parameters(), model2.parameters(), strict=True):
            p.grad.mul_(-1.5)
            q.grad = p.grad.clone()
        rate.mul_(0.5), decay.mul_(0.9)
        for group in optimizer2.param_groups:
            group["lr"] = 2e-3 * 0.5 ** (update - 1)
        graph.replay()
        norm = l2_norm([p.grad for p in model2.parameters()])
        optimizer2.step(grad_scale=clip_factor(norm, 0.3), ema_decay=0.5 * 0.9 ** (update - 1))
    same(model, model2), same(teacher.module, teacher2.module)
