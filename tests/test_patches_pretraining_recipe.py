"""Which models and recipes Data2VecPretraining takes."""

from dataclasses import replace

import pytest
import torch
from pretraining_models import EMA, MODALITIES, encoder

from d2v_fast import Data2VecConfig, Data2VecPretraining
from d2v_fast.errors import CheckpointError
from d2v_fast.nn.masking import BlockMask
from d2v_fast.patches import PatchError


def test_recipe():
    mask = BlockMask(num_masked=5, min_block=2)
    model = Data2VecPretraining(encoder("image"), mask=mask, head_layers=2)
    assert model.recipe.mask == mask and len(model.head) == 3
    config = replace(model.recipe, ema=EMA)
    assert Data2VecPretraining(encoder("image"), config=config).recipe == config
    assert Data2VecPretraining(encoder("speech", hidden_dropout=0.3)).recipe.encoder.dropout == 0.3
    assert model.config is model.encoder.config


@pytest.mark.parametrize("modality", MODALITIES)
def test_mappings_change_fields_of_the_recipe(modality):
    """What is not named stays as in the preset; dataclasses take its place."""
    preset = Data2VecPretraining(encoder(modality)).recipe
    model = Data2VecPretraining(encoder(modality), ema={"decay": 0.5, "end_decay": 0.75}, targets={"top_k": 2}, loss={})
    assert model.recipe.ema == replace(preset.ema, decay=0.5, end_decay=0.75)
    assert model.recipe.targets == replace(preset.targets, top_k=2) and model.recipe.loss == preset.loss
    assert model.update_teacher() == model.recipe.ema.decay_at(1)
    config = replace(preset, ema=EMA)
    changed = Data2VecPretraining(encoder(modality), config=config, ema={"per": "micro_batch"}).recipe
    assert changed == replace(config, ema=replace(EMA, per="micro_batch"))


def test_bad_models():
    with pytest.raises(PatchError, match=r"Data2VecAudioModel, Data2VecTextModel, Data2VecVisionModel, got Linear"):
        Data2VecPretraining(torch.nn.Linear(1, 1))
    with pytest.raises(PatchError, match="got str"):
        Data2VecPretraining("facebook/data2vec-audio-base")
    with pytest.raises(CheckpointError, match="hidden_act='relu'"):
        Data2VecPretraining(encoder("text", hidden_act="relu"))
    with pytest.raises(PatchError, match="use_shared_relative_position_bias"):
        Data2VecPretraining(encoder("image", use_shared_relative_position_bias=False, use_relative_position_bias=True))
    model = encoder("text")

    class Adapter(torch.nn.Linear):
        pass

    model.encoder.layer[0].output.dense = Adapter(48, 32)
    with pytest.raises(PatchError, match=r"encoder\.layer\.0\.output\.dense must be .* got .*Adapter"):
        Data2VecPretraining(model)


def test_bad_recipes():
    with pytest.raises(TypeError, match="targets, loss, ema, mask, prune, head_layers, got 'top_k'"):
        Data2VecPretraining(encoder("text"), top_k=3)
    bad = [
        (TypeError, "head_layers, got 'top_k', 'per'", {"top_k": 3, "per": "update"}),
        (
            TypeError,
            "ema must have fields of decay, .*, per, got 'decays', 'skips'",
            {"ema": {"decays": 1, "skips": ()}},
        ),
        (TypeError, "ema must be EMAConfig or a mapping of its fields, got float", {"ema": 0.999}),
        (TypeError, "mask must be TokenSpanMask or a mapping of its fields, got BlockMask", {"mask": BlockMask()}),
        (TypeError, "head_layers must be int, got str", {"head_layers": "2"}),
        (TypeError, "head_layers must be int, got bool", {"head_layers": True}),
        (ValueError, r"ema.decay and end_decay must be in \[0, 1\], got 2 and", {"ema": {"decay": 2}}),
        (ValueError, "targets.norm must be one of", {"targets": {"norm": "other"}}),
        (TypeError, "config must be a Data2VecConfig, got dict", {"config": {"ema": {}}}),
    ]
    for error, message, given in bad:
        with pytest.raises(error, match=message):
            Data2VecPretraining(encoder("text"), **given)
    with pytest.raises(ValueError, match="config must be for text, as hf_model is, got one for speech"):
        Data2VecPretraining(encoder("text"), config=Data2VecConfig.speech())
    with pytest.raises(ValueError, match=r"frontend\.vocab_size is 50 there, 50265 in config; .*encoder\.layers is 3"):
        Data2VecPretraining(encoder("text"), config=Data2VecConfig.text())
    with pytest.raises(ValueError, match=r"mask_token_id must be in 0\.\.49, got 50"):
        Data2VecPretraining(encoder("text"), mask_token_id=50)
    with pytest.raises(ValueError, match="mask_token_id must be None for image, got 1"):
        Data2VecPretraining(encoder("image"), mask_token_id=1)
    with pytest.raises(ValueError, match=r"ema\.skip: nothing .* 'elsewhere'"):
        Data2VecPretraining(encoder("text"), ema=replace(EMA, skip=("elsewhere",)))
    with pytest.raises(ValueError, match="profile must be"):
        Data2VecPretraining(encoder("text"), profile="other")
