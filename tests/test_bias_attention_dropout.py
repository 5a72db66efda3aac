"""Dropout of the weights of bias_attention."""

import pytest
import torch
from bias_attention_cases import KINDS, check_against_fp64, dropout_factor, make_inputs
from checks import DEVICE

from d2v_fast.ops import bias_attention

pytestmark = pytest.mark.usefixtures("poison")

BF16 = torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 33, 2, 16, None), (1, 197, 1, 64, None), (1, 20, 2, 24, 130)], ids=str)
def test_dropout_matches_fp64(sizes, kind):
    *shape, keys = sizes
    check_against_fp64(*make_inputs(*shape, kind, Tk=keys), p=0.3, floor=4e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_independence(p):
    B, H, T = 4, 4, 128
    factor = dropout_factor(B, H, T, T, p, seed=3)
    kept = factor > 0.5
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    deviation = (p * (1 - p)) ** 0.5
    flat = kept.double() - (1 - p)
    assert flat.mean().abs() < 4.5 * deviation / flat.numel() ** 0.5
    for dim in range(4):  # no sample, head, query or key is kept more often than others
        means = flat.movedim(dim, 0).flatten(1).mean(1)
        assert means.abs().max() < 5 * deviation / (flat.numel() / flat.shape[dim]) ** 0.5, dim
    for dim, lag in [
        (0, 1),
        (0, 2),
        (1, 1),
        (2, 1),
        (2, 8),
        (2, 64),
        (3, 1),
        (3, 2),
        (3, 8),
        (3, 16),
        (3, 32),
        (3, 64),
    ]:
        a, b = flat.narrow(dim, 0, flat.shape[dim] - lag), flat.narrow(dim, lag, flat.shape[dim] - lag)
        assert (a * b).mean().abs() * a.numel() ** 0.5 < 4.5 * deviation**2, (dim, lag)  # nor do neighbours agree
    assert (flat * flat.transpose(2, 3)).mean().abs() * flat.numel() ** 0.5 < 9 * deviation**2  # nor (i, j) and (j, i)


def test_dropout_follows_the_seed():
    first = dropout_factor(2, 2, 40, 40, 0.3, seed=1)
    assert torch.equal(first, dropout_factor(2, 2, 40, 40, 0.3, seed=1))
    agree = ((first > 0) == (dropout_factor(2, 2, 40, 40, 0.3, seed=2) > 0)).double().mean().item()
    assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.05)
    tensors, _ = make_inputs(2, 40, 2, 16)
    torch.manual_seed(1)
    assert not torch.equal(bias_attention(**tensors, p=0.3), bias_attention(**tensors, p=0.3))


def test_backward_uses_the_mask_of_forward():
    """Gradients of one-hot upstreams show the weights: 0 exactly where forward dropped them."""
    B, T, H = 2, 70, 2
    factor = dropout_factor(B, H, T, T, 0.4, seed=11)
    v = torch.zeros(B, T, H, 70, device=DEVICE, requires_grad=True)
    q = torch.zeros(B, T, H, 70, device=DEVICE, requires_grad=True)
    torch.manual_seed(11)
    out = bias_attention(q, torch.zeros_like(q), v, p=0.4)
    upstream = torch.eye(70, device=DEVICE)[None, :, None].expand(B, T, H, 70)
    for _ in range(2):
        (grad,) = torch.autograd.grad(out, v, upstream, retain_graph=True)
        torch.testing.assert_close(T * grad.permute(0, 2, 3, 1), factor, rtol=1e-5, atol=0)


def test_dropout_off_is_exact():
    tensors, _ = make_inputs(2, 20, 2, 16)
    want, state = bias_attention(**tensors), torch.get_rng_state()
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert torch.equal(bias_attention(**tensors, **options), want)
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing


@pytest.mark.gpu
def test_captured_graph_draws_another_mask_every_time():
    tensors, _ = make_inputs(4, 197, 12, 64, "bias", BF16)
    inputs = [x.requires_grad_() for x in tensors.values()]
    upstream = torch.randn_like(tensors["q"])

    def step():
        out = bias_attention(*inputs, p=0.3)
        return out, *torch.autograd.grad(out, inputs, upstream)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.detach().clone() for x in got])
    assert all(not torch.equal(a, b) for a, b in zip(*replays, strict=True))
    for _, *grads in replays:  # of a softmax: the gradients of a query's logits add up to 0
        assert grads[3].sum(-1).abs().max() < 1e-2 * grads[3].abs().sum(-1).max()
