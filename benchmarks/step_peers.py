"""The other side of ``bench_train_step.py``: whole training steps as their authors wrote them, on our weights.

Speech and text are fairseq's own models, optimizer and norm of the gradients (ve-fairseq), or where it is not installed
their restatement in plain PyTorch (``reference_speech.py``, ``reference_text.py``); images BEiT's Transformer in plain
PyTorch (``tests/beit_style.py``), with the dropout, DropPath and teacher of the published recipe.

A step is made in two ways: as the trainer of its authors makes it (:attr:`Peer.as_trained`), and with float32
parameters under one autocast to bfloat16 (:func:`autocast_step`). Neither has a loss scaler, as bfloat16 needs none.
BEiT's teacher is in float32 then, so that its time hangs on TF32: :func:`tf32` sets it, the caller says which.
Masks come with the batch, while fairseq draws them for speech inside of the model.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import checkout  # noqa: F401
import reference_fairseq
import torch
from common import DEVICE
from reference_speech import SpeechReference
from reference_text import TextReference
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.nn.utils import clip_grad_norm_

import d2v_fast
from d2v_fast.checkpoints import beit, fairseq
from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.patches import Patch
from d2v_fast.train.optim import OptimConfig

TESTS = Path(__file__).parent.parent / "tests"
Step = Callable[[Batch], object]


@dataclass
class Peer:
    """A model of somebody else's, in training mode, and how its trainer makes a step."""

    name: str  # "restated" where it is not its authors' own code
    parameters: list[nn.Parameter]  # that are trained
    loss: Callable[[Batch], Tensor]  # mean over the masked positions, differentiable
    follow: Callable[[int], object]  # the teacher's step after so many updates
    optimizer: Callable[[OptimConfig], torch.optim.Optimizer]  # as its authors call it
    norm: Callable[[list[nn.Parameter], float], Tensor]  # of the gradients, clipped unless the second is 0
    as_trained: Callable[[OptimConfig], Step]  # the update as its trainer makes it; changes the peer's precision
    patch: Callable[[], Patch] | None  # puts our ops under it; None where only its authors' code can be patched


@contextmanager
def tf32(products: bool, convolutions: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on a GPU are allowed to round their factors to TF32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = products, convolutions
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def load(ours: Data2Vec, *, restated: bool = False) -> Peer:
    """The peer of ``ours``, with its weights copied into ours.

    fairseq's own models where it is installed, unless they are asked for ``restated``.
    """
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    if ours.config.modality == "image":
        return _beit(ours)
    if restated or not fairseq_is_installed():
        return _restated(ours)
    return {"speech": _speech, "text": _text}[ours.config.modality](ours)


def fairseq_is_installed() -> bool:
    """Whether fairseq can be imported."""
    try:
        import fairseq  # noqa: F401
    except ImportError:
        return False
    return True


def autocast_step(peer: Peer, optim: OptimConfig) -> Step:
    """One update with float32 parameters, on a GPU under autocast to bfloat16."""
    optimizer, updates = peer.optimizer(optim), iter(range(1, 1_000_000))

    def step(batch: Batch) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = peer.loss(batch)
        loss.backward()
        peer.norm(peer.parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peer.follow(next(updates))

    return step


def _flat_step(peer: Peer, adam: Callable, optim: OptimConfig, halve: Callable[[], None]) -> Step:
    """One update of fairseq's trainer: a model in bfloat16, one flat float32 copy of the weights for Adam."""
    halve()
    flat = reference_fairseq.FlatOptimizer(peer.parameters, partial(adam, **_settings(optim)))
    updates = iter(range(1, 1_000_000))

    def step(batch: Batch) -> None:
        count = batch.num_masked
        (count * peer.loss(batch)).backward()  # the sum: the trainer divides the gradients
        flat.step(1 / count, optim.clip_norm)
        flat.zero_grad()
        peer.follow(next(updates))

    return step


def _settings(optim: OptimConfig) -> dict[str, object]:
    return {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}


def _host_mask() -> Callable[[Batch], Tensor]:
    """The mask of a batch on the host, where fairseq draws it; nothing is copied again for the batch before."""
    last: list = [None, None]

    def host_mask(batch: Batch) -> Tensor:
        if last[0] is not batch:
            last[:] = batch, batch.mask.cpu()
        return last[1]

    return host_mask


def _restated(ours: Data2Vec) -> Peer:
    speech = ours.config.modality == "speech"
    with DEVICE:
        model = (SpeechReference if speech else TextReference)(ours.config).train()
    _share(dict(model.state_dict()), fairseq.rules_for(ours.config), ours)

    host_mask = _host_mask()

    def loss(batch: Batch) -> Tensor:
        if speech:
            total = model.loss(batch.inputs.to(model.mask_emb.dtype), host_mask(batch))
        else:
            total = model.loss(batch.inputs, batch.mask)
        return total / batch.num_masked

    def halve() -> None:
        model.bfloat16()
        model.make_teacher()

    return _fairseq_peer(
        "fairseq, restated", model, loss, model.follow, reference_fairseq.Adam, reference_fairseq.clip_grad_norm_, halve
    )


def _fairseq_peer(
    name: str, model: nn.Module, loss: Callable, follow: Callable, adam: Callable, norm: Callable, halve: Callable,
    patch: Callable[[], Patch] | None = None,
) -> Peer:  # fmt: skip
    parameters = list(model.parameters())
    peer = Peer(
        name, parameters, loss, follow, lambda optim: adam(parameters, **_settings(optim)), norm,
        lambda optim: _flat_step(peer, adam, optim, halve), patch,
    )  # fmt: skip
    return peer


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

    host_mask = _host_mask()

    def loss(batch: Batch) -> Tensor:
        out = model(batch.inputs.to(model.mask_emb.dtype), mask_indices=host_mask(batch).numpy())
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

    def halve() -> None:
        model.bfloat16()
        for part in (model, getattr(model, "encoder", model)):  # one of them has the teacher
            if getattr(part, "ema", None) is not None:
                part.ema = None
        model.set_num_updates(0)

    return _fairseq_peer(
        "fairseq", model, loss, model.set_num_updates, Adam, clip_grad_norm_, halve, lambda: d2v_fast.patch(model)
    )


def _share_weights(model: nn.Module, ours: Data2Vec, to_state: Callable, to_teacher: Callable) -> None:
    model.to(DEVICE).set_num_updates(0)  # makes the teacher
    model.train()
    state = to_state(model, ours.config.encoder.layers)
    ours.load_state_dict({**state, **to_teacher(ours, state)})


def _beit(ours: Data2Vec) -> Peer:
    import beit_style

    config, encoder, frontend = ours.config, ours.config.encoder, ours.config.frontend
    with DEVICE:
        student = beit_style.VisionTransformerForCyclicalTraining(
            frontend.image_size, frontend.patch_size, encoder.dim, encoder.heads, encoder.layers,
            ratio=encoder.ffn_dim / encoder.dim, scale=encoder.layer_scale, drop_path=encoder.drop_path,
            dropout=encoder.attention_dropout,
        )  # fmt: skip
    with torch.no_grad():
        for p in student.parameters():
            if p.ndim > 1:
                p.normal_(std=0.02)
    teacher = beit_style.ModelEmaV2(student, config.ema.decay)
    _share_beit(student, ours)

    def loss(batch: Batch, teacher_autocast: bool = True) -> Tensor:
        allowed = torch.is_autocast_enabled(DEVICE.type) and teacher_autocast
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=allowed):
            ends = teacher.module(batch.inputs, bool_masked_pos=None, return_all_tokens=True, layer_results="end")
        normed = [layer_norm(x.float(), x.shape[-1:]) for x in ends[-config.targets.top_k :]]
        target = layer_norm(sum(normed) / len(normed), normed[0].shape[-1:])[batch.mask]
        outputs = student(batch.inputs, bool_masked_pos=batch.mask, return_all_tokens=False)
        return smooth_l1_loss(outputs.float(), target, beta=config.loss.beta)

    def optimizer(optim: OptimConfig) -> torch.optim.Optimizer:
        free = [p for name, p in student.named_parameters() if p.ndim == 1 or name == "cls_token"]
        decayed = [p for name, p in student.named_parameters() if not (p.ndim == 1 or name == "cls_token")]
        groups = [{"params": decayed}, {"params": free} | ({} if optim.decay_vectors else {"weight_decay": 0.0})]
        return torch.optim.AdamW(groups, **_settings(optim))  # foreach on a GPU, PyTorch's default

    def as_trained(optim: OptimConfig) -> Step:  # the trainer calls the teacher outside of its autocast
        return autocast_step(replace(peer, loss=partial(loss, teacher_autocast=False)), optim)

    peer = Peer(
        "BEiT, restated", list(student.parameters()), loss, partial(_follow, student, teacher=teacher), optimizer,
        lambda params, most: clip_grad_norm_(params, most or math.inf), as_trained,
        partial(d2v_fast.patch, student, teacher=teacher),
    )  # fmt: skip
    return peer


def _follow(student: nn.Module, update: int, teacher: nn.Module) -> None:
    teacher.update(student)  # by a decay that is the same at every update


def _share_beit(student: nn.Module, ours: Data2Vec) -> None:
    _share({f"model.{name}": x for name, x in student.state_dict().items()}, beit.rules_for(ours.config), ours)


def _share(state: dict[str, Tensor], rules: list, ours: Data2Vec) -> None:
    """Copy the weights ``state`` of a student into ours and into its teacher."""
    rules = [rule for rule in rules if not rule.ours.startswith("teacher.")]
    weights = {rule.ours: rule.merge([state[name] for name in rule.theirs]) for rule in rules}
    teacher = {f"teacher.module.{name}": weights[name] for name in ours.teacher.module.state_dict()}
    ours.load_state_dict(weights | teacher)
