"""fairseq's speech stack, tiny, and copies of its parts with our methods in them.

Dropout is 0, so that numbers can be compared; LayerDrop is not, as its draws are upstream's.
"""

import copy
import random
from types import SimpleNamespace
from unittest import mock

import fairseq_peer as peer
import numpy as np
import torch
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.wav2vec import wav2vec2 as upstream
from parity import assert_equal
from torch import nn

from d2v_fast.patches._core import PARTS, Options, Patch
from d2v_fast.patches._sharing import copy_memo
from d2v_fast.patches.fairseq import wav2vec2

ENCODER = {"encoder_layers": 3, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 4}
CONVS = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
SETTINGS = {
    **ENCODER,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_layerdrop": 0.3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
WHOLE = {"dropout_input": 0.0, "dropout_features": 0.0, "conv_feature_layers": str(CONVS), "final_dim": 16}
FINE = Options(frozenset(PARTS) - {"encoder"})  # the seams below the encoder


def moved(module: nn.Module) -> nn.Module:
    """With biases and norms away from 0 and 1, in training mode and the default dtype."""
    module.to(torch.get_default_dtype())
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module.train()


def make_encoder(depth: int = 5, batch_norm: bool = False, **settings) -> nn.Module:
    config = upstream.Wav2Vec2Config(**{**SETTINGS, "conv_pos": 95 if depth > 1 else 16, **settings})
    config.pos_conv_depth, config.conv_pos_batch_norm = depth, batch_norm
    return moved(upstream.TransformerEncoder(config))


def patched(module: nn.Module, options: Options | None = None) -> tuple[nn.Module, Patch]:
    """A copy of a part with our methods in it."""
    options = options or Options()
    copied, handle = copy.deepcopy(module, copy_memo(module)), Patch("test")
    handle.apply(wav2vec2.sites(copied, handle, options), options)
    return copied, handle


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Of all parameters that have one; of keys' biases it is rounding."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in found.items() if "k_proj.bias" not in name}


def padding(T: int) -> torch.Tensor:
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[1, 7:] = True
    return mask


def both(theirs: nn.Module, ours: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, tolerance: float, **options):
    """Outputs, layer results and gradients of ``extract_features`` are the same, and what NumPy draws next."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else ~mask
    upstream_grad = torch.randn_like(x) * valid[..., None]
    found = []
    for module in (theirs, ours):
        np.random.seed(3)
        out, layers = module.extract_features(x.clone(), mask, **options)
        drawn = np.random.random()
        assert all(weights is None for _, weights, _ in layers)
        states = [y.transpose(0, 1)[valid] for output, _, result in layers for y in (output, result)]
        module.zero_grad()
        out.backward(upstream_grad)
        found.append((dict(enumerate([out[valid], *states])), gradients(module), drawn))
    (want, want_gradients, drawn), (got, got_gradients, drawn_by_ours) = found
    assert drawn == drawn_by_ours and len(got) == len(want) and got_gradients.keys() == want_gradients.keys()
    assert_equal(got, want, tolerance)
    assert_equal(got_gradients, want_gradients, tolerance)


def wav2vec(**settings) -> nn.Module:
    config = upstream.Wav2Vec2Config(**{**SETTINGS, **WHOLE, "num_negatives": 5, **settings})
    return moved(upstream.Wav2Vec2Model(config))


def hubert(**settings) -> nn.Module:
    config = HubertConfig(**{**SETTINGS, **WHOLE, "label_rate": 50, "mask_length": 3, **settings})
    dictionary = peer.fairseq.data.Dictionary()
    for i in range(7):
        dictionary.add_symbol(str(i))
    return moved(HubertModel(config, SimpleNamespace(sample_rate=16_000), [dictionary]))


def loss_of(model: nn.Module) -> torch.Tensor:
    """The model's own pretraining loss, of seeds that are the same for every call."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    waves, mask = torch.randn(2, 8_000), torch.zeros(2, 8_000, dtype=torch.bool)
    mask[1, 6_000:] = True
    chosen = torch.arange(48).view(2, 24) % 3 == 0
    if isinstance(model, HubertModel):
        with mock.patch.dict(model.__dict__):  # masks are a seam of their own
            model.apply_mask = lambda x, *rest: (torch.where(chosen[..., None], model.mask_emb, x), chosen)
            out = model(waves, target_list=[torch.arange(48).view(2, 24) % 7], padding_mask=mask)
        loss = sum(nn.functional.cross_entropy(x, x.new_zeros(len(x), dtype=torch.long)) for x in model.get_logits(out))
        return loss + out["features_pen"]
    out = model(waves, padding_mask=mask, mask_indices=chosen)
    return nn.functional.cross_entropy(model.get_logits(out), model.get_targets(None, out)) + out["features_pen"]
