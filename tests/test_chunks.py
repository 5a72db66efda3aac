"""The table that lets one launch work on many tensors, without the tensors."""

import pytest
import torch
from checks import DEVICE, RUNS_KERNELS

if not RUNS_KERNELS:
    pytest.skip("needs the Triton kernels", allow_module_level=True)

import triton
import triton.language as tl

from d2v_fast.kernels import chunks


@triton.jit
def _where_kernel(table_ptr, num_tensors, out_ptr, CHUNK: tl.constexpr, LANES: tl.constexpr):
    column, start, size = chunks.locate(table_ptr, num_tensors, CHUNK, LANES)
    address = chunks.pointer(table_ptr, 2, column, num_tensors, start, tl.float32, False).to(tl.int64)
    out = out_ptr + tl.program_id(0) * 4
    tl.store(out, column.to(tl.int64))
    tl.store(out + 1, start)
    tl.store(out + 2, size.to(tl.int64))
    tl.store(out + 3, address)


def pieces(sizes, addresses, chunk):
    """(tensor, first element, elements, address) of every program."""
    table = chunks.build_table(sizes, [addresses], chunk, torch.device(DEVICE))
    out = torch.full((table.programs, 4), -1, dtype=torch.int64, device=DEVICE)
    _where_kernel[(table.programs,)](table.data, table.tensors, out, CHUNK=chunk, LANES=table.lanes)
    return [tuple(row) for row in out.tolist()]


@pytest.mark.parametrize("num_tensors", [1, 31, 32, 33, 300])
def test_every_element_belongs_to_one_program(num_tensors):
    sizes = [1 + (7 * i) % 200 for i in range(num_tensors)]
    addresses = [2**40 + 4096 * i for i in range(num_tensors)]
    want = [
        (i, start, min(64, size - start), addresses[i] + 4 * start)
        for i, size in enumerate(sizes)
        for start in range(0, size, 64)
    ]
    assert pieces(sizes, addresses, 64) == want


def test_tensors_beyond_int32():
    """Five billion elements in a tensor, 20 GB behind its start: addresses and starts need 64 bits."""
    sizes, addresses = [3, 5 * 10**9, 8], [2**46, 2**45 + 16, 2**44]
    chunk = 2**28
    found = pieces(sizes, addresses, chunk)
    assert found[0] == (0, 0, 3, 2**46) and found[-1] == (2, 0, 8, 2**44)
    assert [row[1] for row in found[1:-1]] == list(range(0, 5 * 10**9, chunk))
    assert sum(row[2] for row in found[1:-1]) == 5 * 10**9
    assert all(address == 2**45 + 16 + 4 * start for _, start, _, address in found[1:-1])


@pytest.mark.parametrize("count", [1, 479, 480, 481, 1000])
def test_int_tensor_holds_any_values(count):
    values = [0, 1, 16, 2**31, 2**57 - 1][:count] + list(range(max(count - 5, 0)))
    assert chunks.int_tensor(values, torch.device(DEVICE)).tolist() == values


def test_values_are_written_by_a_kernel():
    """As on a GPU: also when values are far apart, and behind those of an earlier launch."""
    count = chunks._VALUES_PER_LAUNCH
    assert 8 * count + 64 <= 4096 and count % 16 == 0
    values = [0, 1, 16, 2**31, 2**57 - 1] + [2**45 + 16 * i for i in range(count - 5)]
    out = torch.full((3 * count,), -1, dtype=torch.int64, device=DEVICE)
    coded = tuple(2 * value + chunks._ODD_LARGE for value in values)
    chunks._write_kernel[(1,)](out, coded, count, BLOCK=512, num_warps=1)
    assert out.tolist() == [-1] * count + values + [-1] * count
