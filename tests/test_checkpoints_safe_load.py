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
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_fast.checkpoints import pickles
from d2v_fast.checkpoints.pickles import Name, Stub
from d2v_fast.checkpoints.safe_load import plain, read_torch
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
    assert refused > 15


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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", random.Random(0).randbytes(100))
    with pytest.raises(CheckpointError, match=r"bomb/data\.pkl is compressed"):
        read_torch(path)
    # a storage of 10^15 elements in the pickle, 16 bytes in the file
    with zipfile.ZipFile(save(tmp_path / "x.pt", {"x": torch.arange(4.0)})) as archive:
        raw = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    huge = raw.replace(b"cpuq\x06K\x04", b"cpuq\x06\x8a\x07\x00\x80\xc6\xa4\x7e\x8d\x03")
    assert huge != raw
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        read_torch(with_pickle(path, huge))


def latin(text: bytes) -> bytes:
    """A pickled string."""
    return b"X" + len(text).to_bytes(4, "little") + text


GREEDY = {  # pickle, what the message says
    "a bytearray of any size": (
        b"c__builtin__\nbytearray\nJ\xff\xff\xff\x03\x85R.",
        "builtins.bytearray, which is not",
    ),
    "bytes that are not there": (b"\x8e" + (2**30).to_bytes(8, "little") + b"x.", "damaged"),
    "an array that is not there": (b"\x96" + (2**26).to_bytes(8, "little") + b"x.", "damaged"),
    "copies of one string": (
        b"c_codecs\nencode\nq\x00" + latin(b"x" * 10**5) + b"q\x01" + latin(b"latin1") + b"q\x02]("
        b"" + b"h\x00h\x01h\x02\x86R" * 500 + b"e.",
        "makes more of its values than it holds",
    ),
    "copies of one list": (
        b"c__builtin__\nset\nq\x00](" + b"K\x01" * 20_000 + b"eq\x01](" + b"h\x00h\x01\x85R" * 500 + b"e.",
        "makes more of its values than it holds",
    ),
    "tuples in tuples as a key": (b")" + b"\x85" * 10**5 + b"q\x00}h\x00K\x01s.", "a key of type tuple"),
    "tuples twice in tuples as a key": (b")" + b"2\x86" * 40 + b"q\x00}h\x00K\x01s.", "a key of type tuple"),
    "the same in a set": (b"c__builtin__\nset\n](" + b")" + b"2\x86" * 40 + b"e\x85R.", "a key of type tuple"),
    "the same in a set of protocol 4": (b"\x8f()" + b"2\x86" * 40 + b"\x90.", "a key of type tuple"),
    "the same in a frozenset": (b"()" + b"2\x86" * 40 + b"\x91.", "a key of type tuple"),
    "the same in an ordered dictionary": (
        b"ccollections\nOrderedDict\n])" + b"2\x86" * 40 + b"K\x01\x86a\x85R.",
        "a key of type tuple",
    ),
    "the same as a size": (b"ctorch\nSize\n)" + b"2\x86" * 40 + b"\x85\x85R.", "torch.Size of something else"),
    "keys that collide": (b"}(" + b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00K\x01u.", "a key of type int"),
    "a huge integer": (b"\x8b" + (10**5).to_bytes(4, "little") + b"\x01" * 10**5 + b".", "an integer of 799993 bits"),
    "an operation of another kind": (b"(iargparse\nNamespace\n.", "the opcode INST"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_and_time_are_bounded_by_the_file(name, tmp_path):
    """Little files that would take gigabytes, hours, or the interpreter's whole stack."""
    raw, message = GREEDY[name]
    path = with_pickle(tmp_path / "greedy.pt", b"\x80\x02" + raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"greedy\.pt .*{message}"):
            read_torch(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 40 * path.stat().st_size


def test_the_memo_is_as_large_as_what_is_in_it(tmp_path):
    path = with_pickle(tmp_path / "memo.pt", b"\x80\x02K\x07r\xff\xff\xff\x010j\xff\xff\xff\x01.")
    tracemalloc.start()
    try:
        assert read_torch(path) == 7
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@FORMATS
def test_expanded_tensors_are_refused(zipped, tmp_path):
    """One element as a table of a million, which a model would be made for."""
    for view in (
        torch.zeros(1).expand(10**6, 768),
        torch.zeros(3).as_strided((2, 2), (1, 1)),
        torch.ones(1, 2).expand(2, 2),
    ):
        path = save(tmp_path / "expanded.pt", {"x": view}, zipped)
        with pytest.raises(CheckpointError, match=r"expanded\.pt is damaged .* a tensor of size .* in a storage of"):
            read_torch(path)


def test_legacy_storages_are_within_the_file(tmp_path):
    """Announced sizes are compared with the file before any memory is taken."""
    whole = save(tmp_path / "x.pt", {"x": torch.arange(4.0)}, zipped=False).read_bytes()
    announced = b"K\x04N"  # four elements, no view
    assert whole.count(announced) == 1
    (tmp_path / "x.pt").write_bytes(whole.replace(announced, b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"N"))
    with pytest.raises(CheckpointError, match=r"a storage of \d+ bytes, more than the file has"):
        read_torch(tmp_path / "x.pt")


def test_storages_of_another_size_than_announced(tmp_path):
    with zipfile.ZipFile(save(tmp_path / "x.pt", {"x": torch.arange(4.0)})) as archive:
        raw = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    path = with_pickle(tmp_path / "y.pt", raw.replace(b"cpuq\x06K\x04", b"cpuq\x06K\x08"))
    with pytest.raises(CheckpointError, match="storage 0 has 16 bytes, not 32"):
        read_torch(path)


def parts_of_zip(value: object) -> tuple[bytes, bytes]:
    """The entries of a torch file of ``value``, and its directory of two."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(value, 2))
        archive.writestr("x/version", b"3")
    raw = buffer.getvalue()
    end = raw.rindex(b"PK\x05\x06")
    start = int.from_bytes(raw[end + 16 : end + 20], "little")
    return raw[:start], raw[start:end]


def test_two_directories_in_one_zip(tmp_path):
    """Readers disagree on which one counts; what is checked has to be what is read."""
    first, one = parts_of_zip({"read": "by torch"})
    second, other = parts_of_zip({"read": "by zip.."})
    assert len(one) == len(other) and len(first) == len(second)
    numbers = struct.pack("<HHHHIIH", 0, 0, 2, 2, len(one), len(first), 0)
    path = tmp_path / "two.pt"
    path.write_bytes(first + one + second + other + b"PK\x05\x06" + numbers)
    assert torch.load(path, weights_only=True) == {"read": "by torch"}
    with zipfile.ZipFile(path) as archive:
        checked = pickle.loads(archive.read("x/data.pkl"))
    assert read_torch(path) == checked == {"read": "by zip.."}


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
