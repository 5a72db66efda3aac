"""Torch files that are damaged, lie about sizes, or would take more than they hold: refused in one sentence."""

import argparse
import io
import pickle
import random
import struct
import tracemalloc
import zipfile

import pytest
import torch
from torch_files import FORMATS, save, with_pickle

from d2v_fast.checkpoints.safe_load import read_torch
from d2v_fast.errors import CheckpointError


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
