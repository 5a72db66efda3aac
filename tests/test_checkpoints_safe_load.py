"""Reading torch files: nothing in them runs, and damaged ones are refused in one sentence."""

import argparse
import builtins
import collections
import functools
import importlib
import io
import operator
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_fast.checkpoints.safe_load import Stub, plain, read_torch
from d2v_fast.errors import CheckpointError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Call:
    """An object whose pickle calls ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save(path: Path, content, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, raw: bytes) -> Path:
    """A zip as torch writes it, with ``raw`` in place of the pickle."""
    with zipfile.ZipFile(save(path, {"x": torch.arange(4.0)})) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, raw if name.endswith("data.pkl") else part)
    return path


def nested(effect: Path) -> bytes:
    """A torch file inside of a pickle: what torch.storage._load_from_bytes would open without restrictions."""
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {effect}"), buffer)
    return buffer.getvalue()


ATTACKS = {  # what the pickle wants to use, which the message has to name
    "posix.system": lambda effect: Call(os.system, f"touch {effect}"),
    "builtins.eval": lambda effect: Call(eval, f"open({str(effect)!r}, 'w')"),
    "builtins.exec": lambda effect: Call(exec, f"open({str(effect)!r}, 'w')"),
    "builtins.open": lambda effect: Call(open, str(effect), "w"),
    "builtins.getattr": lambda effect: Call(getattr, "text", "upper"),
    "builtins.__import__": lambda effect: Call(builtins.__import__, "os"),
    "operator.attrgetter": lambda effect: Call(operator.attrgetter, "system"),
    "operator.methodcaller": lambda effect: Call(operator.methodcaller, "system"),
    "functools.partial": lambda effect: functools.partial(os.system, f"touch {effect}"),
    "subprocess.Popen": lambda effect: Call(subprocess.Popen, ["touch", str(effect)]),
    "importlib.import_module": lambda effect: Call(importlib.import_module, "os"),
    "torch.storage._load_from_bytes": lambda effect: Call(torch.storage._load_from_bytes, nested(effect)),
    "torch.serialization.load": lambda effect: Call(torch.load, str(effect)),
    "numpy.load": lambda effect: Call(np.load, str(effect), None, True),
    "collections.ChainMap": lambda effect: collections.ChainMap({}),
}


@FORMATS
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused(name, zipped, tmp_path):
    effect = tmp_path / "effect"
    content = {"cfg": argparse.Namespace(a=1), "model": {"w": torch.ones(2)}, "attack": ATTACKS[name](effect)}
    path = save(tmp_path / "attack.pt", content, zipped)
    with pytest.raises(CheckpointError, match=r"attack\.pt is refused") as error:
        read_torch(path)
    attribute = name.rpartition(".")[2]  # the module may have another name in old protocols
    assert f".{attribute}, which is not on the list" in str(error.value)
    assert not effect.exists()


RAW = {
    "a function of a stubbed module": b"cargparse\n_sys.exit\n(tR.",
    "a submodule is not imported": b"cfairseq.nothing_of_this_name\nThing\n(tR.",
    "attributes set on a class": b"cargparse\nNamespace\n(N}X\x01\x00\x00\x00aK\x01stb.",
    "attributes set on our functions": b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x05\x00\x00\x00aliveK\x01stb.",
}


@pytest.mark.parametrize("name", RAW)
def test_stubs_have_no_effect(name, tmp_path):
    """These may load or be refused; either way nothing is imported, called or changed."""
    from d2v_fast.checkpoints import safe_load

    before = set(sys.modules)
    path = with_pickle(tmp_path / "raw.pt", b"\x80\x02" + RAW[name])
    try:
        found = read_torch(path)
    except CheckpointError as error:
        assert "raw.pt" in str(error)
    else:
        assert isinstance(found, Stub) or (isinstance(found, type) and issubclass(found, Stub))
    assert not {module for module in set(sys.modules) - before if module.startswith("fairseq")}
    assert not hasattr(safe_load._tensor, "alive") and not hasattr(argparse.Namespace, "a") and not hasattr(Stub, "a")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86tR.", "refused|damaged"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR.", "numpy.dtype 'O8'"),
        (b"ccopy_reg\n_reconstructor\n(ccollections\nOrderedDict\nctorch\nfloat32\nNtR.", "_reconstructor"),
        (b"ctorch\nload\n(tR.", "torch.load"),
        (b"c__builtin__\neval\n(tR.", "builtins.eval"),
        (b"cos\nsystem\n(tR.", "os.system"),
    ],
)
def test_constructors_check_what_they_are_given(raw, message, tmp_path):
    stub = b"cargparse\nNamespace\n0"  # what keeps torch's own reader from taking the file
    path = with_pickle(tmp_path / "raw.pt", b"\x80\x02" + stub + raw)
    with pytest.raises(CheckpointError, match=message):
        read_torch(path)


@FORMATS
def test_views_stay_inside_their_storage(zipped, tmp_path):
    """A tensor that claims more than the file holds, next to a configuration."""
    base = torch.arange(4.0)
    outside = [((5,), (1,), 0), ((2, 2), (3, 1), 0), ((1,), (1,), 4), ((-1,), (1,), 0), ((2,), (-1,), 1)]
    for size, stride, offset in outside:
        view = Call(torch._utils._rebuild_tensor_v2, base._typed_storage(), offset, size, stride, False, None)
        path = save(tmp_path / "view.pt", {"args": argparse.Namespace(), "x": view}, zipped)
        with pytest.raises(CheckpointError, match="a tensor of size"):
            read_torch(path)
    inside = Call(torch._utils._rebuild_tensor_v2, base._typed_storage(), 1, (3, 1), (1, 5), False, None)
    found = read_torch(save(tmp_path / "view.pt", {"args": argparse.Namespace(), "x": inside}, zipped))
    assert torch.equal(found["x"], base[1:, None])


@FORMATS
@pytest.mark.parametrize("config", [False, True], ids=["weights", "configuration"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_are_bit_equal(config, zipped, dtype, tmp_path):
    x = torch.randn(6, 5).mul(100).to(dtype)
    content = {"x": x, "view": x[1::2, 2:].t(), "scalar": torch.tensor(3, dtype=dtype), "empty": x[:0], "n": 3}
    content |= {"args": argparse.Namespace(lr=0.1)} if config else {}
    found = read_torch(save(tmp_path / "x.pt", content, zipped))
    for name, want in content.items():
        if isinstance(want, torch.Tensor):
            assert found[name].dtype == dtype and torch.equal(found[name], want)
    assert found["n"] == 3


@FORMATS
def test_configurations_become_plain_values(zipped, tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    values = {
        "model": {"layers": 3, "rate": 0.5, "name": "x", "list": [1, [2]], "none": None},
        "ref": "${model.layers}",
    }
    content = {
        "cfg": omegaconf.OmegaConf.create(values),
        "args": argparse.Namespace(lr=[0.1], inner=argparse.Namespace(path=Path("/some/where"))),
        "metrics": collections.OrderedDict(loss=np.float64(1.5), count=np.int64(2), flag=np.bool_(True)),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "set": {1, 2},
    }
    found = read_torch(save(tmp_path / "x.pt", content, zipped))
    assert plain("x", found["cfg"]) == values
    assert plain("x", found["args"])["lr"] == [0.1]
    assert dict(found["metrics"]) == {"loss": 1.5, "count": 2, "flag": True} and found["set"] == {1, 2}
    assert torch.equal(found["parameter"], torch.ones(2))


def test_configurations_that_multiply_are_refused(tmp_path):
    """Ten lists, each of ten times the one before: 10^10 values in a hundred bytes."""
    value = [0]
    for _ in range(10):
        value = [value] * 10
    found = read_torch(save(tmp_path / "x.pt", {"args": argparse.Namespace(x=value)}))
    with pytest.raises(CheckpointError, match="at most 100000 values"):
        plain("x", found["args"])
    loop: dict = {}
    loop["again"] = loop
    with pytest.raises(CheckpointError, match="must not contain itself"):
        plain("x", loop)


@FORMATS
def test_damaged_files(zipped, tmp_path):
    """Cut off anywhere: an error. One byte changed: an error, or a byte that carries no meaning."""
    content = {"args": argparse.Namespace(a=1), "x": torch.arange(50.0), "y": torch.ones(3).half()}
    whole = save(tmp_path / "whole.pt", content, zipped).read_bytes()
    path = tmp_path / "damaged.pt"
    for length in (0, 1, 3, 20, 100, len(whole) // 2, len(whole) - 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged\.pt"):
            read_torch(path)
    if not zipped:
        return  # without checksums
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        position = rng.randrange(len(whole))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            found = read_torch(path)
        except CheckpointError as error:
            refused += "damaged.pt" in str(error)
        else:
            assert torch.equal(found["x"], content["x"]) and torch.equal(found["y"], content["y"])
    assert refused > 20


def test_other_files(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(CheckpointError, match="no file at"):
        read_torch(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_torch(tmp_path)
    for content, found in (
        (b"", "got nothing"),
        (b"text", "got something else"),
        (pickle.dumps({"a": 1}), "got something else"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"must be a file that torch.save wrote, {found}"):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "a zip of something")
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", pickle.dumps({}))
        archive.writestr("file/constants.pkl", pickle.dumps(()))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_torch(path)


def test_zips_that_claim_more_than_they_hold(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}))
        archive.writestr("bomb/data/0", bytes(10**7))
    with pytest.raises(CheckpointError, match=r"claims to hold 1000000\d bytes, but has"):
        read_torch(path)
    # a storage of 10^15 elements in the pickle, 16 bytes in the file
    with zipfile.ZipFile(save(tmp_path / "x.pt", {"x": torch.arange(4.0)})) as archive:
        raw = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    huge = raw.replace(b"cpuq\x06K\x04", b"cpuq\x06\x8a\x07\x00\x80\xc6\xa4\x7e\x8d\x03")
    assert huge != raw
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        read_torch(with_pickle(path, huge))
