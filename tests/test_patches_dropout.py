"""Dropout under transformers: ours draws other masks than upstream, of the same distribution.

A batch of one sequence, repeated, is as many independent draws. Means and covariances over them, of the output, the
gradient behind it and a loss, are compared between patched and plain models. DropPath is not here: its draws are
upstream's own.
"""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="needs transformers")

from d2v_fast.patches import patch  # noqa: E402

DRAWS, POSITIONS, CHANNELS, RATE = 1024, 5, 16, 0.2
SIZES = {"hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
OPTIONS = {
    "Audio": {"conv_dim": (8,) * 7, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0},
    "Text": {"vocab_size": 20, "max_position_embeddings": 20},
    "Vision": {"image_size": 4, "patch_size": 2, "use_relative_position_bias": True, "drop_path_rate": 0.0},
}
PLACES = {
    "Audio": ("hidden_dropout", "attention_dropout", "activation_dropout"),
    "Text": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "Vision": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
each_place = pytest.mark.parametrize(("modality", "place"), [(key, place) for key in PLACES for place in PLACES[key]])


def model(modality, place, rate=RATE):
    """A tiny model in training, with dropout at one place alone."""
    torch.manual_seed(0)
    rates = dict.fromkeys(PLACES[modality], 0.0) | {place: rate}
    config = getattr(transformers, f"Data2Vec{modality}Config")(**SIZES, **OPTIONS[modality], **rates)
    made = getattr(transformers, f"Data2Vec{modality}Model")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))  # what a sublayer adds is as large as its input
    return made.train()


def draw(made, seed):
    """Outputs, gradients and losses of N draws: [N, T * C + T * C + 1]."""
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, POSITIONS, CHANNELS, generator=g)
    x = x.expand(DRAWS, -1, -1).clone().requires_grad_()
    arguments = {"resolution": (4, 4)} if "Vision" in type(made).__name__ else {}
    torch.manual_seed(seed)
    output = made.encoder(x, **arguments).last_hidden_state
    loss = F.smooth_l1_loss(output, target.expand_as(output), reduction="none").flatten(1).mean(1, keepdim=True)
    loss.sum().backward()
    return torch.cat([output.detach().flatten(1), x.grad.flatten(1), loss.detach()], 1)


def moments(draws):
    """Means [D], their squared errors [D]; covariances [D, D], their squared errors [D, D]."""
    mean, centred = draws.double().mean(0), draws.double() - draws.double().mean(0)
    covariance, squares = centred.T @ centred / DRAWS, centred.square()
    errors = (squares.T @ squares / DRAWS - covariance.square()) / DRAWS
    return mean, covariance.diagonal() / DRAWS, covariance, errors


def apart(got, want):
    """Squared differences over their expectation, which is 1 for draws of one distribution, where above the limit.

    On average over all elements, and of the loss, the last one, alone. From seed to seed models without the patch have
    up to 2, 1.3, 7 and 13.
    """
    (mean, mean_error, covariance, error), other = moments(got), moments(want)
    means = (mean - other[0]).square() / (mean_error + other[1])
    covariances = (covariance - other[2]).square() / (error + other[3])
    found = {
        "means": (means.mean(), 3.5),
        "covariances": (covariances.mean(), 1.6),
        "mean of the loss": (means[-1], 16),
        "variance of the loss": (covariances[-1, -1], 25),
    }
    return {name: value.item() for name, (value, limit) in found.items() if not value < limit}


@each_place
def test_same_distribution(modality, place):
    want = draw(model(modality, place), seed=0)
    for seed, switches in enumerate(({}, {"encoder": False}), 1):
        made = model(modality, place)
        with patch(made, **switches) as handle:
            got = draw(made, seed)
            assert not handle.fallbacks() and handle.calls > 0
        assert apart(got, want) == {}


@each_place
def test_other_rates_are_found(modality, place):
    """What is compared differs without this dropout, and at twice its rate."""
    want = draw(model(modality, place), seed=0)
    for seed, rate in enumerate((0.0, 2 * RATE), 1):
        found = apart(draw(model(modality, place, rate), seed), want)
        assert {"means", "covariances"} <= found.keys(), rate
