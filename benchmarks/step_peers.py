"""The other side of ``bench_train_step.py``: whole training steps as their authors wrote them, on our weights.

Speech and text are fairseq's own models, optimizer and norm of the gradients (ve-fairseq), images BEiT's Transformer in
plain PyTorch (``tests/beit_style.py``), with the dropout, DropPath and teacher of the published recipe.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from common import DEVICE
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.nn.utils import clip_grad_norm_

import d2v_fast
from d2v_fast.checkpoints import beit
from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.patches import Patch

TESTS = Path(__file__).parent.parent / "tests"


@dataclass
class Peer:
    """A model of somebody else's, in training mode, and how its trainer makes a step."""

    name: str
    parameters: list[nn.Parameter]  # that are trained
    loss: Callable[[Batch], Tensor]  # mean over the masked positions, differentiable
    follow: Callable[[int], object]  # the teacher's step after so many updates
    adamw: Callable[..., torch.optim.Optimizer]  # as its authors call it: tensor by tensor
    norm: Callable[[list[nn.Parameter]], Tensor]  # of the gradients, which both trainers log
    patch: Callable[[], Patch]  # puts our ops under it


def load(ours: Data2Vec) -> Peer | None:
    """The peer of ``ours``, with its weights copied into ours; None where it is not installed."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    if ours.config.modality == "image":
        return _beit(ours)
    try:
        import fairseq  # noqa: F401
    except ImportError:
        return None
    return {"speech": _speech, "text": _text}[ours.config.modality](ours)


def _speech(ours: Data2Vec) -> Peer:
    import fairseq_peer

    config, encoder = ours.config, ours.config.encoder
    model = fairseq_peer.audio.Data2VecAudioModel(
        fairseq_peer.audio.Data2VecAudioConfig(
            extractor_mode="layer_norm",
            conv_feature_layers=str(list(config.frontend.conv_layers)),
            conv_pos=encoder.pos_conv_width,
            pos_conv_depth=encoder.pos_conv_depth,
            encoder_layers=encoder.layers,
            encoder_embed_dim=encoder.dim,
            encoder_ffn_embed_dim=encoder.ffn_dim,
            encoder_attention_heads=encoder.heads,
            average_top_k_layers=config.targets.top_k,
            instance_norm_target_layer=True,
            dropout=encoder.dropout,
            attention_dropout=encoder.attention_dropout,
            encoder_layerdrop=encoder.layerdrop,
            ema_decay=config.ema.decay,
            ema_end_decay=config.ema.end_decay,
            ema_anneal_end_step=config.ema.anneal_updates,
            max_update=400_000,
        )
    )
    _share_weights(model, ours, fairseq_peer.speech_state, fairseq_peer.teacher_state)

    def loss(batch: Batch) -> Tensor:
        out = model(batch.inputs, mask_indices=batch.mask.cpu().numpy())  # fairseq's own are drawn on the host as well
        return out["losses"]["regression"] / out["sample_size"]

    return _of_fairseq(model, loss)


def _text(ours: Data2Vec) -> Peer:
    import fairseq_peer

    config, encoder, frontend = ours.config, ours.config.encoder, ours.config.frontend
    settings = fairseq_peer.text.Data2VecTextConfig()
    settings.max_positions, settings.head_layers = frontend.max_positions, config.head_layers
    settings.average_top_k_layers, settings.layer_norm_target_layer = config.targets.top_k, True
    settings.loss_beta, settings.loss_scale = config.loss.beta, 1.0
    settings.ema_decay, settings.ema_end_decay = config.ema.decay, config.ema.end_decay
    settings.ema_anneal_end_step = config.ema.anneal_updates
    t = settings.transformer
    t.dropout, t.attention_dropout, t.activation_dropout = encoder.dropout, encoder.attention_dropout, 0.0
    t.activation_fn, t.layernorm_embedding, t.no_scale_embedding = "gelu", True, True
    t.max_source_positions, t.encoder.learned_pos, t.encoder.normalize_before = frontend.max_positions, True, False
    t.encoder.embed_dim, t.encoder.ffn_embed_dim = encoder.dim, encoder.ffn_dim
    t.encoder.layers, t.encoder.attention_heads = encoder.layers, encoder.heads
    dictionary = fairseq_peer.fairseq.data.Dictionary()
    for i in range(frontend.vocab_size - len(dictionary) - 1):
        dictionary.add_symbol(f"w{i}")
    mask_index = dictionary.add_symbol("<mask>")
    task = SimpleNamespace(source_dictionary=dictionary, cfg=SimpleNamespace(data=""))
    model = fairseq_peer.text.Data2VecTextModel.build_model(settings, task)
    _share_weights(model, ours, fairseq_peer.text_state, fairseq_peer.teacher_state)

    def loss(batch: Batch) -> Tensor:
        out = model(
            src_tokens=batch.inputs.masked_fill(batch.mask, mask_index),
            target_tokens=batch.inputs.masked_fill(~batch.mask, frontend.pad_index),
        )
        return out["losses"]["main"] / out["sample_size"]

    return _of_fairseq(model, loss)


def _of_fairseq(model: nn.Module, loss: Callable[[Batch], Tensor]) -> Peer:
    from fairseq.optim.adam import Adam  # with decoupled weight decay, as AdamW
    from fairseq.utils import clip_grad_norm_

    return Peer(
        "fairseq", list(model.parameters()), loss, model.set_num_updates, Adam,
        lambda params: clip_grad_norm_(params, 0), lambda: d2v_fast.patch(model),
    )  # fmt: skip


def _share_weights(model: nn.Module, ours: Data2Vec, to_state: Callable, to_teacher: Callable) -> None:
    model.to(DEVICE).set_num_updates(0)  # makes the teacher
    model.train()
    state = to_state(model, ours.config.encoder.layers)
    ours.load_state_dict({**state, **to_teacher(ours, state)})


def _beit(ours: Data2Vec) -> Peer:
    import beit_style

    config, encoder, frontend = ours.config, ours.config.encoder, ours.config.frontend
    student = beit_style.VisionTransformerForCyclicalTraining(
        frontend.image_size, frontend.patch_size, encoder.dim, encoder.heads, encoder.layers,
        ratio=encoder.ffn_dim / encoder.dim, scale=encoder.layer_scale, drop_path=encoder.drop_path,
        dropout=encoder.attention_dropout,
    ).to(DEVICE)  # fmt: skip
    with torch.no_grad():
        for p in student.parameters():
            if p.ndim > 1:
                p.normal_(std=0.02)
    teacher = beit_style.ModelEmaV2(student, config.ema.decay)
    _share_beit(student, ours)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            ends = teacher.module(batch.inputs, bool_masked_pos=None, return_all_tokens=True, layer_results="end")
        normed = [layer_norm(x.float(), x.shape[-1:]) for x in ends[-config.targets.top_k :]]
        target = layer_norm(sum(normed) / len(normed), normed[0].shape[-1:])[batch.mask]
        outputs = student(batch.inputs, bool_masked_pos=batch.mask, return_all_tokens=False)
        return smooth_l1_loss(outputs.float(), target, beta=config.loss.beta)

    adamw, norm = partial(torch.optim.AdamW, foreach=False), partial(clip_grad_norm_, max_norm=math.inf)
    put = partial(d2v_fast.patch, student, teacher=teacher)
    return Peer("BEiT", list(student.parameters()), loss, lambda _: teacher.update(student), adamw, norm, put)


def _share_beit(student: nn.Module, ours: Data2Vec) -> None:
    state = {f"model.{name}": x for name, x in student.state_dict().items()}
    rules = [rule for rule in beit.rules_for(ours.config) if not rule.ours.startswith("teacher.")]
    weights = {rule.ours: rule.merge([state[name] for name in rule.theirs]) for rule in rules}
    averages = {name: x for name, x in weights.items() if not name.startswith("head.")}
    ours.load_state_dict(weights | {f"teacher.module.{name}": x for name, x in averages.items()})
