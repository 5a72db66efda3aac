"""data2vec pretraining for speech, images and text: fused kernels, a lean model, one command."""

import importlib as _importlib
import os as _os

__version__ = "0.1.0"

# In a source checkout the Triton kernels sit next to this folder, not inside it.
# Installed copies already contain d2v_fast/kernels, so this is a no-op there.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))

_PUBLIC = {
    "Data2Vec": "d2v_fast.nn",
    "Data2VecConfig": "d2v_fast.nn",
    "Data2VecPretraining": "d2v_fast.patches.pretraining",
    "adamw_ema_": "d2v_fast.ops",
    "beit_loss": "d2v_fast.patches.beit.engine",
    "beit_targets": "d2v_fast.patches.beit.engine",
    "bias_attention": "d2v_fast.ops",
    "bias_gelu": "d2v_fast.ops",
    "build_extension": "d2v_fast.ops._extension",
    "conv0_norm_gelu": "d2v_fast.ops",
    "data2vec_loss": "d2v_fast.ops",
    "ema_update_": "d2v_fast.ops",
    "info": "d2v_fast._info",
    "l2_norm": "d2v_fast.ops",
    "layer_norm_gelu": "d2v_fast.ops",
    "layer_targets": "d2v_fast.ops",
    "load_beit": "d2v_fast.checkpoints",
    "load_fairseq": "d2v_fast.checkpoints",
    "load_transformers": "d2v_fast.checkpoints",
    "masked_smooth_l1": "d2v_fast.ops",
    "patch": "d2v_fast.patches",
    "patch_all": "d2v_fast.patches",
    "pos_conv": "d2v_fast.ops",
    "residual_dropout_layer_norm": "d2v_fast.ops",
    "strided_conv": "d2v_fast.ops",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    # Public names are resolved on first use, so that the import itself stays free of side effects.
    if name in _PUBLIC:
        return getattr(_importlib.import_module(_PUBLIC[name]), name)
    if name == "patches":  # d2v_fast.patches.compare(...)
        return _importlib.import_module("d2v_fast.patches")
    raise AttributeError(f"module 'd2v_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
