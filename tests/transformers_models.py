"""Tiny models of transformers, what they read, and how two runs of one are compared.

Weights are not at trivial values, the gradient from above is random, dropout is 0 unless a test says otherwise.
"""

import pytest
import torch
from parity import TOLERANCE, relative

transformers = pytest.importorskip("transformers", reason="needs transformers")

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "final_dropout"),
    0.0,
)
SPEECH = WIDTHS | NO_DROPOUT | {"conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
TEXT = WIDTHS | {"vocab_size": 40, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
TEXT |= {"attention_probs_dropout_prob": 0.0}
VISION = WIDTHS | {"image_size": 24, "patch_size": 8, "drop_path_rate": 0.0, "use_mask_token": True}
OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
CASES = {
    "audio": ("Data2VecAudio", {}),
    "wav2vec2": ("Wav2Vec2", {}),
    "wav2vec2-stable": ("Wav2Vec2", STABLE),
    "hubert": ("Hubert", {}),
    "hubert-stable": ("Hubert", STABLE),
    "text": ("Data2VecText", {}),
    "vision": ("Data2VecVision", {}),
    "vision-own": ("Data2VecVision", OWN),
    "vision-shared": ("Data2VecVision", SHARED),
}
ONE_EACH = pytest.mark.parametrize("name", ["wav2vec2-stable", "audio", "text", "vision-own"])


def make(name, kind="Model", **changes):
    """A model of a case, in training mode."""
    prefix, settings = CASES[name]
    base = TEXT if prefix.endswith("Text") else VISION if prefix.endswith("Vision") else SPEECH
    config = getattr(transformers, f"{prefix}Config")(**base | settings | changes)
    model = getattr(transformers, prefix + kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.train()


def batch(name, padded=False):
    """What the model of a case reads, two samples, the second shorter if ``padded``."""
    if name == "text":
        mask = torch.arange(20) < torch.tensor([[20], [13]])
        return {"input_ids": torch.randint(4, 40, (2, 20))} | ({"attention_mask": mask.long()} if padded else {})
    if name.startswith("vision"):
        return {"pixel_values": torch.randn(2, 3, 24, 24)}
    mask = torch.arange(4000) < torch.tensor([[4000], [2600]])
    return {"input_values": torch.randn(2, 4000)} | ({"attention_mask": mask.long()} if padded else {})


def run(model, inputs, **options):
    """(output, gradients by name) with the same random numbers every time."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**inputs, **options)
    torch.manual_seed(2)
    torch.sum(out.last_hidden_state * torch.randn(out.last_hidden_state.shape)).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def same(got, want):
    """Outputs and gradients agree; a bias of keys has none in exact arithmetic, and is measured by that of queries."""
    (out, grads), (expected, wanted) = got, want
    assert relative(out.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert {name for name, g in grads.items() if g is None} == {name for name, g in wanted.items() if g is None}
    for name, g in grads.items():
        if g is not None:
            size = wanted[name.replace("k_proj.bias", "q_proj.bias").replace("key.bias", "query.bias")].norm()
            assert (g - wanted[name]).norm() <= TOLERANCE * size + 1e-7, name
    if expected.hidden_states is not None:
        assert len(out.hidden_states) == len(expected.hidden_states)
        assert all(relative(a, b) <= TOLERANCE for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))


def attributes(model):
    return {path: dict(module.__dict__) for path, module in model.named_modules()}
