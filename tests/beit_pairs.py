"""A model built like BEiT's, with and without the drop-in: what the tests of it share."""

from contextlib import contextmanager
from unittest import mock

import torch
from beit_style import VisionTransformerForCyclicalTraining

from d2v_fast.nn import TransformerEncoder

TOLERANCE = 1e-5


def model(**options):
    """Weights large enough for each part to show in the outputs."""
    torch.manual_seed(0)
    made = VisionTransformerForCyclicalTraining(**options)
    with torch.no_grad():
        for parameter in made.blocks.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def data(seed=0):
    """Images, and a mask of patches."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 6, 6, generator=g) < 0.5
    return torch.randn(3, 3, 24, 24, generator=g), mask


@contextmanager
def encoder_calls():
    """Counts forwards of our encoder."""
    with mock.patch.object(TransformerEncoder, "forward", autospec=True, side_effect=TransformerEncoder.forward) as spy:
        yield spy


def outputs(made, *call):
    """Results of one call, and the gradients that random ones of theirs give."""
    made.zero_grad()
    torch.manual_seed(5)  # DropPath draws the same
    out = made(*call)
    results = list(out) if isinstance(out, (list, tuple)) else [out]
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(results)]
    torch.autograd.backward(results, grads)
    return results, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def agree(got, want, tolerance=TOLERANCE):
    assert len(got) == len(want)
    names = want if isinstance(want, dict) else range(len(want))
    for name in names:
        assert got[name].dtype == want[name].dtype, name
        assert (got[name] - want[name]).norm() <= tolerance * want[name].norm() + 1e-12, name
