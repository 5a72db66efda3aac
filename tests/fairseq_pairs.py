"""fairseq's speech and text models, and ours with the same weights. Dropout and LayerDrop are off."""

from dataclasses import replace
from types import SimpleNamespace

import fairseq_peer as peer
import torch
from torch import nn

from d2v_fast.nn import Data2Vec, Data2VecConfig

TINY = {"layers": 3, "dim": 64, "ffn_dim": 96, "heads": 4}
BASE = {"layers": 2, "dim": 768, "ffn_dim": 3072, "heads": 12}  # the published widths
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
EMA = {"decay": 0.5, "end_decay": 0.9, "anneal_updates": 10}
VOCAB = 60  # with <mask>, the last
NORMS = {
    "instance": {"instance_norm_target_layer": True},  # the released LibriSpeech recipe
    "instance+layer": {"instance_norm_target_layer": True, "layer_norm_targets": True},  # AudioSet
    "instance+instance": {"instance_norm_target_layer": True, "instance_norm_targets": True},
    "layer": {"layer_norm_target_layer": True},
    "batch": {"batch_norm_target_layer": True},
    "none": {},
}


def speech_config(
    norm: str = "instance", mode: str = "layer", profile: str = "fairseq", sizes: dict = TINY, beta: float = 0.0
) -> Data2VecConfig:
    """Ours; convolutions have 32 channels, at the published widths 512."""
    config = Data2VecConfig.speech(profile=profile)
    per_layer, _, post = norm.partition("+")
    width = 512 if sizes["dim"] == 768 else 32
    convs = tuple((width, kernel, stride) for _, kernel, stride in config.frontend.conv_layers)
    return replace(
        config,
        frontend=replace(config.frontend, conv_layers=convs, conv_norm=mode),
        encoder=replace(config.encoder, **sizes, **NO_DROPOUT),
        targets=replace(config.targets, top_k=2, norm=per_layer, post_norm=post or "none"),
        loss=replace(config.loss, beta=beta),
        ema=replace(config.ema, **EMA),
    )


def speech_pair(norm: str = "instance", mode: str = "layer", **options) -> tuple[nn.Module, Data2Vec]:
    """(fairseq's model with its teacher, ours); ``options`` as for :func:`speech_config`."""
    config = speech_config(norm, mode, **options)
    encoder = config.encoder
    theirs = peer.audio.Data2VecAudioModel(
        peer.audio.Data2VecAudioConfig(
            extractor_mode={"layer": "layer_norm", "group": "default"}[mode],
            encoder_layers=encoder.layers,
            encoder_embed_dim=encoder.dim,
            encoder_ffn_embed_dim=encoder.ffn_dim,
            encoder_attention_heads=encoder.heads,
            conv_feature_layers=str(list(config.frontend.conv_layers)),
            conv_pos=95,
            pos_conv_depth=5,
            average_top_k_layers=config.targets.top_k,
            dropout=0.0,
            attention_dropout=0.0,
            encoder_layerdrop=0.0,
            ema_decay=EMA["decay"],
            ema_end_decay=EMA["end_decay"],
            ema_anneal_end_step=EMA["anneal_updates"],
            max_update=EMA["anneal_updates"],
            loss_beta=config.loss.beta,
            **NORMS[norm],
        )
    )
    return with_teachers(theirs, Data2Vec(config), peer.speech_state)


def text_config(profile: str = "fairseq", sizes: dict = TINY, beta: float = 4.0) -> Data2VecConfig:
    """Ours, with a vocabulary of 60 and 40 positions."""
    config = Data2VecConfig.text(profile=profile)
    return replace(
        config,
        frontend=replace(config.frontend, vocab_size=VOCAB, max_positions=40, dropout=0.0),
        encoder=replace(config.encoder, **sizes, **NO_DROPOUT),
        targets=replace(config.targets, top_k=2),
        loss=replace(config.loss, beta=beta),
        ema=replace(config.ema, **EMA),
    )


def text_pair(profile: str = "fairseq", **options) -> tuple[nn.Module, Data2Vec]:
    """(fairseq's model with its teacher, ours); ``options`` as for :func:`text_config`."""
    ours = text_config(profile, **options)
    sizes = ours.encoder
    config = peer.text.Data2VecTextConfig()
    config.max_positions = 40
    config.head_layers, config.average_top_k_layers = 2, ours.targets.top_k
    config.layer_norm_target_layer, config.loss_beta, config.loss_scale = True, ours.loss.beta, 1.0
    config.ema_decay, config.ema_end_decay, config.ema_anneal_end_step = EMA.values()
    t = config.transformer
    t.dropout = t.attention_dropout = t.activation_dropout = 0.0
    t.activation_fn, t.layernorm_embedding, t.no_scale_embedding, t.max_source_positions = "gelu", True, True, 40
    t.encoder.embed_dim, t.encoder.ffn_embed_dim = sizes.dim, sizes.ffn_dim
    t.encoder.layers, t.encoder.attention_heads = sizes.layers, sizes.heads
    t.encoder.learned_pos, t.encoder.normalize_before = True, False

    dictionary = peer.fairseq.data.Dictionary()
    for i in range(VOCAB - 5):
        dictionary.add_symbol(f"w{i}")
    dictionary.add_symbol("<mask>")
    assert len(dictionary) == VOCAB
    task = SimpleNamespace(source_dictionary=dictionary, cfg=SimpleNamespace(data=""))
    theirs = peer.text.Data2VecTextModel.build_model(config, task)
    return with_teachers(theirs, Data2Vec(ours), peer.text_state)


def with_teachers(theirs: nn.Module, ours: Data2Vec, to_state) -> tuple[nn.Module, Data2Vec]:
    """Both in training mode: fairseq's with the teacher it makes before the first step, ours with the same weights."""
    theirs.to(torch.get_default_dtype())  # the mask embedding is float32 whatever the default
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake need not show
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    theirs.set_num_updates(0)
    state = to_state(theirs, ours.config.encoder.layers)
    ours.load_state_dict({**state, **peer.teacher_state(ours, state)})
    return theirs.train(), ours.train()


def move_students(theirs: nn.Module, ours: Data2Vec, to_state) -> None:
    """Change fairseq's student, copy it into ours, and let both teachers follow twice."""
    for update in (1, 2):
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.02 * torch.randn_like(p))
        ours.load_state_dict(to_state(theirs, ours.config.encoder.layers), strict=False)
        theirs.set_num_updates(update)
        ours.teacher.update_(update)
