"""Reading torch files: nothing in them runs, and what is plain comes back as it was."""

import argparse
import builtins
import collections
import functools
import importlib
import io
import operator
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_files import FORMATS, Call, save, with_pickle

from d2v_fast.checkpoints import pickles
from d2v_fast.checkpoints.pickles import Name, Stub
from d2v_fast.checkpoints.safe_load import plain, read_torch
from d2v_fast.errors import CheckpointError


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
    before = set(sys.modules)
    path = with_pickle(tmp_path / "raw.pt", b"\x80\x02" + RAW[name])
    try:
        found = read_torch(path)
    except CheckpointError as error:
        assert "raw.pt" in str(error)
    else:
        assert type(found) in (Stub, Name)
    assert not {module for module in set(sys.modules) - before if module.startswith("fairseq")}
    assert not hasattr(pickles._tensor, "alive") and not hasattr(argparse.Namespace, "a") and not hasattr(Stub, "a")


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
    path = with_pickle(tmp_path / "raw.pt", b"\x80\x02" + raw)
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
    with pytest.raises(CheckpointError, match="nested 50 deep"):
        plain("x", loop)
    text = ["x" * 10**5] * 10**4  # a gigabyte in a message
    with pytest.raises(CheckpointError, match="at most 100000 values"):
        plain("x", {"dropout": text})


def test_byte_order(tmp_path):
    """Files of machines of the other kind."""
    with zipfile.ZipFile(save(tmp_path / "x.pt", {"x": torch.arange(4.0).half(), "n": torch.arange(3)})) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, part in parts.items():
            if "/data/" in name:
                part = np.frombuffer(part, ">i2" if len(part) == 8 else ">i8").byteswap().tobytes()
            archive.writestr(name, b"big" if name.endswith("byteorder") else part)
    found = read_torch(tmp_path / "x.pt")
    assert torch.equal(found["x"], torch.arange(4.0).half()) and torch.equal(found["n"], torch.arange(3))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol, tmp_path):
    content = {
        "args": argparse.Namespace(a=[1, 2.5, None, True, b"bytes", "text", 2**70, -3], path=Path("x"), set={1}),
        "nested": collections.OrderedDict(a=(1, (2, (3, 4, 5, 6))), b=collections.defaultdict(list, {3: [1]})),
        "x": torch.arange(6.0).reshape(2, 3).t(),
        "device": torch.device("cuda"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "frozen": frozenset({"a"}),
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    found = read_torch(tmp_path / "x.pt")
    assert plain("x", found["args"]) == {**vars(content["args"]), "path": "x", "set": [1]}
    assert found["nested"] == {"a": (1, (2, (3, 4, 5, 6))), "b": {3: [1]}}
    assert torch.equal(found["x"], content["x"]) and found["x"].stride() == content["x"].stride()
    assert found["size"] == (2, 3) and found["dtype"] is torch.bfloat16 and found["frozen"] == {"a"}
    assert found["device"].name == "torch.device"
