"""fairseq's ``Data2VecAudioModel`` beside the same with our methods, and a batch for both."""

import copy

import numpy as np
import torch
from fairseq_pairs import speech_pair
from parity import assert_equal, gradients
from patched import perturb, repeat_masks, same_as_upstream

import d2v_fast

EVEN, ODD = 8000, 8320  # samples: 24 and 25 frames
LENGTHS = np.array([0, 1600, 1300])  # samples less, in padded batches


def batch(seed=0, samples=EVEN, padded=False):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.arange(samples) >= torch.from_numpy(samples - LENGTHS)[:, None]
    waves = torch.randn(3, samples, generator=generator)
    if not padded:
        return {"source": waves}
    return {"source": waves.masked_fill(padding, 0), "padding_mask": padding}


def upstreams(norm="instance", **options):
    """fairseq's model with its teacher, moved away from the student; ``options`` are changed in model and ``cfg``."""
    torch.manual_seed(0)
    model = speech_pair(norm)[0]
    perturb(model)
    for name, value in options.items():
        setattr(model.cfg, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    return model


def pair(norm="instance", switches=None, **options):
    theirs = upstreams(norm, **options)
    ours = copy.deepcopy(theirs)
    return theirs, ours, d2v_fast.patch(ours, **(switches or {}))


def run(model, monkeypatch, inputs):
    """The result and every gradient, with the same random numbers each time."""
    repeat_masks(monkeypatch)
    np.random.seed(2)  # LayerDrop's first draws are 0.44, 0.03, 0.55
    torch.manual_seed(1)
    model.zero_grad()
    out = model(**inputs)
    out["losses"]["regression"].backward()
    return out, gradients(model)


def trained(tensors):
    """Without the biases of keys, which have no gradient in exact arithmetic."""
    return {name: x for name, x in tensors.items() if not name.endswith("self_attn.k_proj.bias")}


def assert_same(theirs, ours, monkeypatch, inputs=None, tolerance=1e-5):
    inputs = batch() if inputs is None else inputs
    want, grads = run(theirs, monkeypatch, inputs)
    got, ours_grads = run(ours, monkeypatch, inputs)
    same_as_upstream(got, want, tolerance)
    assert_equal(trained(ours_grads), trained(grads), tolerance)
    none = [{name for name, p in model.named_parameters() if p.grad is None} for model in (ours, theirs)]
    assert none[0] == none[1]
