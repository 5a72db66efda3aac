"""Files of the real libraries: fairseq -> ours -> transformers and back, the same features everywhere.

Features are the hidden states of every layer, in eval mode; files are written and read by each library's own code.
"""

import argparse
import copy
import logging

import numpy as np
import pytest
import torch
from parity import TOLERANCE, relative

pytest.importorskip("fairseq_peer")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import fairseq_peer as peer  # noqa: E402
from fairseq import checkpoint_utils  # noqa: E402
from fairseq_pairs import BASE, TINY, VOCAB, move_students, speech_pair, text_pair  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from d2v_fast import load_beit, load_fairseq, load_transformers  # noqa: E402
from d2v_fast.checkpoints import save_beit, save_fairseq, save_transformers  # noqa: E402
from d2v_fast.errors import CheckpointError  # noqa: E402
from d2v_fast.nn import Data2Vec, Data2VecConfig  # noqa: E402

SIZES = pytest.mark.parametrize("sizes", [TINY, BASE], ids=["tiny", "base"])
PAIRS = {"speech": (speech_pair, peer.speech_state), "text": (text_pair, peer.text_state)}
NAMES = {"speech": "data2vec_audio", "text": "data2vec_text"}
CLASSES = {"speech": "Data2VecAudioModel", "text": "Data2VecTextModel", "image": "Data2VecVisionModel"}


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """transformers reports on what it loads in pages; fairseq's text model looks up an attribute that it never sets."""
    transformers.logging.set_verbosity_error()
    monkeypatch.setattr(peer.text.Data2VecTextEncoder, "target_model", None, raising=False)


def moved_pair(modality: str, **options):
    """(fairseq's model, ours) with the same weights, teachers apart from the students."""
    make, to_state = PAIRS[modality]
    theirs, ours = make(**options)
    move_students(theirs, ours, to_state)
    return theirs.eval(), ours.eval()


def as_config(model, modality: str, kind: str):
    """What fairseq's trainer stores: plain values; before 2022 also omegaconf's objects, or argparse's."""
    values = OmegaConf.to_container(OmegaConf.structured(model.cfg), enum_to_str=True) | {"_name": NAMES[modality]}
    if modality == "text":  # the pair's sizes are attributes of the class itself, which OmegaConf does not look at
        encoder = values["transformer"]["encoder"]
        encoder |= {name: getattr(model.cfg.transformer.encoder, name) for name in encoder}
    cfg = {"model": values, "task": {"_name": "any"}, "optimization": {"max_update": 10}}
    if kind != "args":
        return {"args": None, "cfg": OmegaConf.create(cfg) if kind == "objects" else cfg}
    values |= {"arch": NAMES[modality], "max_update": 10}
    if modality == "text":
        transformer = values.pop("transformer")
        encoder = transformer.pop("encoder")
        values |= transformer | {f"encoder_{name}": value for name, value in encoder.items()}
    return {"args": argparse.Namespace(**values), "cfg": None}


def fairseq_file(path, model, modality: str, kind: str = "plain", zipped: bool = True):
    """A checkpoint as fairseq's trainer writes it."""
    content = {**as_config(model, modality, kind), "model": model.state_dict(), "extra_state": {"epoch": 3}}
    history = {"criterion_name": "ModelCriterion", "lr_scheduler_state": {"best": np.float64(1.5)}, "num_updates": 2}
    content |= {"optimizer_history": [history], "task_state": {}, "criterion": None}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def inputs_for(modality: str, size: int = 24) -> torch.Tensor:
    if modality == "speech":
        return torch.randn(2, 8000)
    return torch.randn(2, 3, size, size) if modality == "image" else torch.randint(4, VOCAB - 1, (2, 37))


@torch.no_grad()
def fairseq_states(model, modality: str, inputs) -> list[torch.Tensor]:
    """Outputs of the layers, [B, T, C]."""
    kept = []
    layers = (model.encoder if modality == "speech" else model.encoder.sentence_encoder).layers
    hooks = [layer.register_forward_hook(lambda _, inputs, output: kept.append(output[0])) for layer in layers]
    model(inputs, mask=False, features_only=True) if modality == "speech" else model(inputs, features_only=True)
    for hook in hooks:
        hook.remove()
    return [x.transpose(0, 1) for x in kept]


@torch.no_grad()
def states(model, inputs) -> list[torch.Tensor]:
    """Outputs of the layers of our model, or of one of transformers'."""
    if isinstance(model, Data2Vec):
        return model.hidden_states(inputs)[1:]
    return list(model.eval()(inputs, output_hidden_states=True).hidden_states[1:])


def assert_features(got, want) -> None:
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative(a[:, : b.shape[1]], b[:, : a.shape[1]]) <= TOLERANCE, index


def from_pretrained(folder, modality: str):
    """transformers' model of a directory of ours, which has to hold exactly the tensors that it wants."""
    options = {} if modality != "text" else {"add_pooling_layer": False}
    kind = getattr(transformers, CLASSES[modality])
    model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


def assert_same_state(a, b) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        if isinstance(x, dict):
            assert_same_state(x, y)
        else:
            assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["plain", "objects", "args"])
@pytest.mark.parametrize("modality", PAIRS)
def test_fairseq_files(modality, kind, tmp_path):
    """Weights, teacher, head and configuration, from each way in which fairseq has stored its options."""
    theirs, ours = moved_pair(modality)
    got = load_fairseq(fairseq_file(tmp_path / "x.pt", theirs, modality, kind, zipped=kind != "objects"))
    for name, x in ours.state_dict().items():  # fairseq rounds 1 - decay once more in its averages
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if name.startswith("teacher.") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got.state_dict()[name], x, **tolerance)
    config = got.config
    assert config.encoder == ours.config.encoder and config.targets == ours.config.targets
    assert config.loss == ours.config.loss and config.ema == ours.config.ema
    assert config.frontend == ours.config.frontend and config.head_layers == ours.config.head_layers


@SIZES
@pytest.mark.parametrize("modality", PAIRS)
def test_fairseq_to_transformers_and_back(modality, sizes, tmp_path):
    """The three libraries agree on every hidden state, and fairseq's own loader reads what comes back."""
    theirs, _ = moved_pair(modality, sizes=sizes)
    inputs = inputs_for(modality)
    want = fairseq_states(theirs, modality, inputs)

    ours = load_fairseq(fairseq_file(tmp_path / "x.pt", theirs, modality))
    assert_features(states(ours, inputs), want)
    save_transformers(ours, tmp_path / "hf")
    assert_features(states(from_pretrained(tmp_path / "hf", modality), inputs), want)
    back = load_transformers(tmp_path / "hf")
    student = {n: x for n, x in back.state_dict().items() if not n.startswith(("teacher.", "head."))}
    assert_same_state(student, {n: ours.state_dict()[n] for n in student})

    save_fairseq(back, tmp_path / "back.pt")
    assert_features(fairseq_states(load_with_fairseq(tmp_path / "back.pt", modality), modality, inputs), want)


def load_with_fairseq(path, modality: str):
    """fairseq's own loader; the text task wants a dictionary."""
    words = "".join(f"w{i} 1\n" for i in range(VOCAB - 5))
    (path.parent / "dict.txt").write_text(words)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(path.parent)} if modality == "text" else None
    )
    assert type(model).__name__ == {"speech": "Data2VecAudioModel", "text": "Data2VecTextModel"}[modality]
    return model.eval()


@pytest.mark.parametrize("mode", ["layer", "group"])
def test_speech_round_trip_is_bit_equal(mode, tmp_path):
    """fairseq's file -> ours -> a file whose model and averages are the same tensors; loaded by fairseq strictly."""
    theirs, _ = moved_pair("speech", mode=mode, norm="instance+layer")
    save_fairseq(load_fairseq(fairseq_file(tmp_path / "x.pt", theirs, "speech")), tmp_path / "back.pt")
    again = load_with_fairseq(tmp_path / "back.pt", "speech")
    assert_same_state(dict(again.state_dict()), dict(theirs.state_dict()))
    options = (
        "average_top_k_layers",
        "instance_norm_target_layer",
        "layer_norm_targets",
        "ema_decay",
        "ema_layers_only",
    )
    for name in (*options, "conv_pos", "extractor_mode", "ema_anneal_end_step", "mask_prob", "loss_beta"):
        assert getattr(again.cfg, name) == getattr(theirs.cfg, name), name


def test_text_round_trip_is_bit_equal(tmp_path):
    theirs, _ = moved_pair("text")
    save_fairseq(load_fairseq(fairseq_file(tmp_path / "x.pt", theirs, "text")), tmp_path / "back.pt")
    again = load_with_fairseq(tmp_path / "back.pt", "text")
    assert_same_state(dict(again.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modality", PAIRS)
def test_low_precision_files_keep_every_bit(modality, dtype, tmp_path):
    """The student in 16 bits, the averages in float32, as fairseq's trainer has them."""
    theirs, _ = moved_pair(modality)
    theirs.to(dtype)
    path = fairseq_file(tmp_path / "x.pt", theirs, modality)
    ours = load_fairseq(path, dtype=None)
    assert next(ours.parameters()).dtype == dtype and next(ours.teacher.parameters()).dtype == torch.float32
    assert next(load_fairseq(path).parameters()).dtype == torch.float32
    save_fairseq(ours, tmp_path / "back.pt")
    again = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert_same_state(dict(again), dict(theirs.state_dict()))
    save_transformers(ours, tmp_path / "hf")
    back = load_transformers(tmp_path / "hf", dtype=None).state_dict()
    student = [name for name in back if not name.startswith(("teacher.", "head."))]
    assert_same_state({n: back[n] for n in student}, {n: ours.state_dict()[n] for n in student})


def transformers_model(modality: str, **options):
    """A random model of transformers, no tensor at a trivial value."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    extra = {
        "speech": {"conv_dim": (32,) * 7},
        "text": {"vocab_size": VOCAB, "max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "image": {"image_size": 24, "patch_size": 4, "use_mask_token": True, "use_mean_pooling": False},
    }[modality]
    config = getattr(transformers, CLASSES[modality].replace("Model", "Config"))(**{**sizes, **extra, **options})
    arguments = {"add_pooling_layer": False} if modality == "text" else {}
    model = getattr(transformers, CLASSES[modality])(config, **arguments).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        if modality == "text":
            model.embeddings.token_type_embeddings.weight.zero_()
    return model


BIASES = [{"use_shared_relative_position_bias": True}, {}]


@pytest.mark.parametrize(
    ("modality", "options"),
    [("speech", {}), ("speech", {"conv_bias": True}), ("text", {}), *(("image", bias) for bias in BIASES)],
)
def test_transformers_round_trip_is_bit_equal(modality, options, tmp_path):
    """A model object and the directory it writes, in one piece and in several, give ours; ours gives the same back."""
    theirs = transformers_model(modality, **options)
    inputs = inputs_for(modality)
    want = states(theirs, inputs)
    theirs.save_pretrained(tmp_path / "x")
    theirs.save_pretrained(tmp_path / "pieces", max_shard_size="100KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    student = None
    for source in (theirs, tmp_path / "x", tmp_path / "pieces"):
        ours = load_transformers(source)
        assert_features(states(ours, inputs), want)
        state = {n: x for n, x in ours.state_dict().items() if not n.startswith("head.")}
        assert student is None or all(torch.equal(x, student[n]) for n, x in state.items())
        student = state
    save_transformers(ours, tmp_path / "back")
    again = from_pretrained(tmp_path / "back", modality)
    assert_same_state(dict(again.state_dict()), dict(theirs.state_dict()))
    assert_features(states(again, inputs), want)


def test_transformers_per_layer_tables(tmp_path):
    """The released image models repeat one table in every layer; different ones have no place in ours."""
    theirs = transformers_model("image", use_relative_position_bias=True)
    with pytest.raises(
        CheckpointError, match=r"encoder\.layer\.1\.attention.* differs from layer 0's; encoder\.layer\.2"
    ):
        load_transformers(theirs)
    tables = [layer.attention.attention.relative_position_bias for layer in theirs.encoder.layer]
    with torch.no_grad():
        for table in tables:
            table.relative_position_bias_table.copy_(tables[0].relative_position_bias_table)
    inputs = inputs_for("image")
    assert_features(states(load_transformers(theirs), inputs), states(theirs, inputs))


def test_transformers_to_beit_and_back(tmp_path):
    theirs = transformers_model("image", use_shared_relative_position_bias=True, layer_norm_eps=1e-6)
    save_beit(load_transformers(theirs), tmp_path / "x.pth")
    save_transformers(load_beit(tmp_path / "x.pth"), tmp_path / "back")
    again = from_pretrained(tmp_path / "back", "image")
    assert_same_state(dict(again.state_dict()), dict(theirs.state_dict()))


def test_transformers_token_types_and_heads(tmp_path, caplog):
    """Two token types, of which ours has the first; the tensors of a task's head are dropped and reported."""
    body = transformers_model("text", type_vocab_size=2)
    with torch.no_grad():
        body.embeddings.token_type_embeddings.weight.normal_()
    inputs = inputs_for("text")
    assert_features(states(load_transformers(body), inputs), states(body, inputs))

    masked = transformers.Data2VecTextForMaskedLM(body.config).eval()
    masked.data2vec_text.load_state_dict(body.state_dict())
    masked.save_pretrained(tmp_path / "x")
    with caplog.at_level(logging.INFO, logger="d2v_fast.checkpoints"):
        assert_features(states(load_transformers(tmp_path / "x"), inputs), states(body, inputs))
    assert "dropped: lm_head" in caplog.text and "initialised: head.* (random)" in caplog.text


def test_transformers_models_without_memory():
    theirs = transformers_model("text")
    theirs.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(
        CheckpointError, match=r"without memory or not dense: encoder\.layer\.1\.output\.dense\.weight; .*bias$"
    ):
        load_transformers(theirs)


def test_transformers_images_without_a_final_norm():
    """Our hidden states are theirs; ours has a norm after the last."""
    theirs = transformers_model("image", use_mean_pooling=True)
    inputs = inputs_for("image")
    ours = load_transformers(theirs)
    with torch.no_grad():
        want = theirs(inputs).last_hidden_state
        assert relative(ours.hidden_states(inputs)[-1], want) <= TOLERANCE
        assert relative(ours.encode(inputs), want) > TOLERANCE


def test_transformers_ctc_model(tmp_path):
    """Fine-tuned models hold the network under a prefix, and no mask embedding if they mask nothing."""
    config = copy.deepcopy(transformers_model("speech").config)
    config.mask_time_prob = 0.0
    theirs = transformers.Data2VecAudioForCTC(config).eval()
    theirs.save_pretrained(tmp_path / "x")
    inputs = inputs_for("speech")
    assert_features(states(load_transformers(tmp_path / "x"), inputs), states(theirs.data2vec_audio, inputs))


def test_the_recipes_have_the_published_tensors():
    """Counts of the released base models' files."""
    from d2v_fast.checkpoints import beit, fairseq

    rules = fairseq.rules_for(Data2VecConfig.speech())
    names = [name for rule in rules for name in rule.theirs]
    assert len(names) == len(set(names)) == 232 + 204 and sum(name.startswith("_ema.") for name in names) == 204
    for size, count in (("base", 190), ("large", 370)):
        names = [name for rule in beit.rules_for(Data2VecConfig.image(size)) for name in rule.theirs]
        assert sum(name.startswith("model.") for name in names) == count - 1  # less the index, which is computed
