"""Tiny models for the tests of checkpoints, and changes to files."""

import json

import pytest
import torch
from tiny import tiny_config

from d2v_fast.nn import Data2Vec

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
MODALITIES = ("speech", "text", "image")
FORMATS = [
    *((modality, format) for modality in MODALITIES for format in ("native", "transformers")),
    ("speech", "fairseq"),
    ("text", "fairseq"),
    ("image", "beit"),
]


def make(modality: str, dtype: torch.dtype = torch.float32, profile: str = "fairseq", **encoder) -> Data2Vec:
    """A tiny model; no tensor at a trivial value, the teacher apart from the student."""
    model = Data2Vec(tiny_config(modality, profile, **encoder))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def rewrite(path, change) -> None:
    """Apply ``change`` to the content of a torch file."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def rewrite_directory(folder, config=None, tensors=None) -> None:
    """Apply changes to the configuration and the tensors of a directory."""
    if config is not None:
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        state = safetensors.load_file(folder / "model.safetensors")
        tensors(state)
        safetensors.save_file(state, folder / "model.safetensors")


def assert_same(a, b, path="") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path
