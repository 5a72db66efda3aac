"""Attention against float64: dense and packed, biases, masks, other queries than keys; every backend of a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import (
    ASKED,
    LENGTHS,
    H,
    check,
    check_dense,
    check_dropout,
    check_packed,
    dropped_weights,
    math_attention,
    random,
    sequences_of,
)
from checks import DEVICE, no_synchronisation

from d2v_fast.nn import attention_backends as backends
from d2v_fast.nn import make_batch
from d2v_fast.nn.attention import attention
from d2v_fast.nn.attention_backends import BACKENDS, Case, lacks
from d2v_fast.nn.attention_calls import sdpa
from d2v_fast.nn.sequences import Sequences


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("extra", ["none", "bias", "alibi"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_math", "bias_attention"])
def test_dense(backend, extra, padded):
    if backend == "bias_attention" and padded:
        pytest.skip("it takes no padding mask")
    check_dense(backend, extra=extra, padded=padded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dense_dtypes(dtype):
    check_dense("auto", dtype, T=40)
    check_dense("auto", dtype, extra="bias")


@pytest.mark.parametrize(("B", "T", "D"), [(1, 1, 8), (3, 65, 20), (1, 130, 64)])
def test_dense_sizes(B, T, D):
    check_dense("auto", B=B, T=T, D=D)


@pytest.mark.parametrize("asked", [None, ASKED], ids=["all", "asked"])
@pytest.mark.parametrize("backend", ["auto", "each", "padded"])
def test_packed(backend, asked):
    check_packed(backend, asked=asked)


@pytest.mark.parametrize("backend", ["each", "padded"])
@pytest.mark.parametrize("lengths", [[1, 2], [0, 4], [6, 6, 6], [0, 0, 2]])
def test_packed_sizes(backend, lengths):
    check_packed(backend, torch.float64, 8, lengths)
    check_packed(backend, torch.bfloat16, 8, lengths, asked=[2] * len(lengths))


@pytest.mark.parametrize("backend", ["each", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_queries_at_all(backend, p):
    keys, queries = sequences_of([5, 9]), sequences_of([0, 0])
    q, kv = random(0, H, 8), random(14, 2, H, 8)
    y = attention(q, *kv.unbind(1), sequences=keys, queries=queries, dropout_p=p, backend=backend)
    (grad,) = torch.autograd.grad(y, kv, torch.empty_like(y), allow_unused=True)
    assert y.shape == (0, H, 8) and (grad is None or not grad.any())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_samples(p):
    x = random(0, 5, H, 8)
    assert attention(x, x, x, dropout_p=p).shape == (0, 5, H, 8)


def test_fewer_queries_than_keys():
    q, kv = random(2, 5, H, 8), random(2, 9, 2, H, 8)
    leaves = {"q": q, "kv": kv, "bias": random(H, 5, 9)}
    check(
        lambda q, kv, bias: attention(q, *kv.unbind(2), bias=bias),
        lambda q, kv, bias: math_attention(q, *kv.unbind(2), bias=bias),
        leaves,
    )


@pytest.mark.parametrize("backend", ["each", "padded"])
def test_dense_packed_and_one_by_one_agree(backend):
    """A padded batch, its valid rows packed, and every sample alone."""
    valid = np.arange(12) < np.array([[12], [5], [8]])
    qkv, sequences = torch.randn(3, 12, 3, H, 16), Sequences.from_mask(valid)
    dense = attention(*qkv.unbind(2), padding_mask=torch.from_numpy(~valid)).flatten(0, 1)
    packed = attention(*sequences.take(qkv.flatten(0, 1)).unbind(1), sequences=sequences, backend=backend)
    alone = [attention(*row[None, :n].unbind(2))[0] for row, n in zip(qkv, valid.sum(1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed, sequences.take(dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["each", "padded"])
@pytest.mark.parametrize("queries_alone", [False, True])
def test_fixed_number_of_rows(backend, queries_alone):
    """Rows that only fill up change nothing in the others' results, wherever they are."""
    mask = np.random.default_rng(0).random((4, 9)) < 0.4
    mask[2] = False
    kv, keys = torch.randn(4 * 9, 2, H, 8), Sequences.even(4, 9)
    k, v = kv.unbind(1)
    exact = Sequences.from_mask(mask)
    if not queries_alone:  # they fill up keys and queries alike, in sequences of their own
        more = Sequences.from_mask(mask, num_rows=exact.num_rows + 11)
        want = attention(*(exact.take(x) for x in (k, k, v)), sequences=exact, backend=backend)
        got = attention(*(more.take(x) for x in (k, k, v)), sequences=more, backend=backend)
    else:  # in the others' sequences
        more = make_batch(torch.zeros(4, 9), mask, num_masked=exact.num_rows + 11).masked
        want = attention(exact.take(k), k, v, sequences=keys, queries=exact, backend=backend)
        got = attention(more.take(k), k, v, sequences=keys, queries=more, backend=backend)
    assert got.isfinite().all()
    torch.testing.assert_close(got[more.real], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "p"), [("auto", 0.0), ("sdpa_math", 0.0), ("by_sample", 0.1)])
def test_samples_of_padding_alone(backend, p):
    qkv = random(2, 6, 3, H, 8)
    padding = torch.tensor([[False] * 5 + [True], [True] * 6])
    y = attention(*qkv.unbind(2), padding_mask=padding, dropout_p=p, backend=backend)
    (grad,) = torch.autograd.grad(y, qkv, torch.randn_like(y))
    assert y.isfinite().all() and grad.isfinite().all()
    assert not grad[0, 5, 1:].any()  # padding gets no gradient as key or value


@pytest.mark.parametrize("backend", ["each", "padded"])
def test_nan_stays_in_its_sequence(backend):
    sequences = sequences_of([4, 3, 6])
    qkv = torch.randn(13, 3, H, 8)
    clean = attention(*qkv.unbind(1), sequences=sequences, backend=backend)
    qkv[5, 1] = float("nan")  # a key of the second
    got = attention(*qkv.unbind(1), sequences=sequences, backend=backend)
    assert got[4:7].isnan().all()
    rest = torch.arange(13).logical_and((torch.arange(13) < 4) | (torch.arange(13) >= 7))
    torch.testing.assert_close(got[rest], clean[rest])


def check_compiled(step, inputs, **options):
    """One graph, with eager's results and gradients."""
    outputs = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager", **options)(*inputs)
    upstream = torch.randn_like(outputs[0])
    want, got = ([y, *torch.autograd.grad(y, inputs, upstream)] for y in outputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph():
    keys, queries = sequences_of(LENGTHS), sequences_of(ASKED)
    inputs = [random(2, 7, 3, H, 8), random(H, 7, 7)]
    check_compiled(lambda qkv, bias: attention(*qkv.unbind(2), bias=bias, backend="sdpa_math"), inputs)
    inputs = [random(queries.num_rows, H, 8), random(keys.num_rows, 2, H, 8)]
    check_compiled(lambda q, kv: attention(q, *kv.unbind(1), sequences=keys, queries=queries), inputs)


def test_compiles_for_unknown_sizes():
    check_compiled(lambda qkv: attention(*qkv.unbind(2)), [random(2, 7, 3, H, 8)], dynamic=True)


def test_rows_without_unit_stride(monkeypatch):
    """They are copied: the kernels of most backends need unit stride in the last dim, and only that."""
    strides = []

    def seen(x):
        strides.extend(y.stride() for y in x[:3])
        return sdpa(x)

    monkeypatch.setattr(backends, "BACKENDS", (replace(BACKENDS[-2], name="seen", call=seen),))
    backends._index.cache_clear()
    try:
        q, k = (torch.randn(2, H, 8, 6).permute(0, 3, 1, 2) for _ in range(2))
        v = torch.randn(2, 6, 3, H, 8)[:, :, 2]
        got = attention(q, k, v)
    finally:
        backends._index.cache_clear()
    assert [stride[-1] for stride in strides] == [1, 1, 1] and strides[2] == v.stride()
    torch.testing.assert_close(got.double(), math_attention(q.double(), k.double(), v.double()), rtol=1e-5, atol=1e-6)


def backends_here(**case):
    """Names of the backends that take a case on this machine's GPU, each once; nothing without one."""
    if DEVICE != "cuda":
        return ["none here"]
    case, capability = Case(**case), torch.cuda.get_device_capability()
    able = (b.name for b in BACKENDS if not b.misfit(case, capability) and not lacks(b.needs))
    return ["auto", *dict.fromkeys(able)]


LOW = (torch.bfloat16, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("D", [64, 80])
@pytest.mark.parametrize("backend", backends_here())
def test_gpu_dense(backend, D, dtype):
    check_dense(backend, dtype, 3, 197, D, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("extra", ["bias", "alibi"])
@pytest.mark.parametrize("backend", backends_here(bias="dense"))
def test_gpu_bias(backend, extra):
    check_dense(backend, torch.bfloat16, 3, 197, 64, extra, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_here(padding=True))
def test_gpu_padding(backend):
    check_dense(backend, torch.bfloat16, 3, 100, 64, padded=True, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 80, 12])
@pytest.mark.parametrize("backend", backends_here(packed=True))
def test_gpu_packed(backend, D):
    if backend == "fa4" and D == 12:
        pytest.skip("it takes multiples of 8")
    check_packed(backend, torch.bfloat16, D, [200, 64, 0, 1, 129], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_here(packed=True, other_queries=True))
def test_gpu_packed_queries(backend):
    check_packed(backend, torch.bfloat16, 64, [200, 64, 0, 1, 129], [17, 0, 3, 1, 129], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_here(packed=True, other_queries=True))
def test_gpu_no_queries_at_all(backend):
    keys, queries = sequences_of([5, 9], "cuda"), sequences_of([0, 0], "cuda")
    kv = random(14, 2, H, 64, dtype=torch.bfloat16, device="cuda")
    q = random(0, H, 64, dtype=torch.bfloat16, device="cuda")
    y = attention(q, *kv.unbind(1), sequences=keys, queries=queries, backend=backend)
    (grad,) = torch.autograd.grad(y, kv, torch.empty_like(y))
    assert y.shape == (0, H, 64) and not grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_here(dtype=torch.float32))
def test_gpu_float32_dense(backend):
    check_dense(backend, T=100, D=64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_here(dtype=torch.float32, packed=True))
def test_gpu_float32_packed(backend):
    check_packed(backend, D=64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", sorted({*backends_here(dropout=True), *backends_here(dropout=True, packed=True)}))
def test_gpu_dropout(backend, packed):
    if backend not in backends_here(dropout=True, packed=packed):
        pytest.skip("for the other layout")
    check_dropout(dropped_weights(backend, packed, 0.3, T=128, device="cuda", dtype=torch.bfloat16), 0.3)


def gpu_step(packed, backend="auto", p=0.1):
    """A function that runs forward and backward, and its inputs."""
    sequences = sequences_of([200, 64, 1, 129], "cuda") if packed else None
    shape = (394, 3, 12, 64) if packed else (2, 197, 3, 12, 64)
    qkv = random(*shape, dtype=torch.bfloat16, device="cuda")
    upstream = torch.randn_like(qkv.select(-3, 0))

    def step(qkv):
        y = attention(*qkv.unbind(-3), sequences=sequences, dropout_p=p, backend=backend)
        return y, *torch.autograd.grad(y, qkv, upstream)

    return step, qkv


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_waits_for_nothing(packed):
    step, qkv = gpu_step(packed)
    step(qkv)
    with no_synchronisation():
        step(qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_graph(packed):
    """A captured graph gives eager's results; with dropout, another mask at every replay."""
    for p in (0.0, 0.1):
        step, qkv = gpu_step(packed, p=p)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            want = step(qkv)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(qkv)
        graph.replay()
        first = [x.clone() for x in got]
        if p == 0:
            torch.testing.assert_close(first[0], want[0])
            torch.testing.assert_close(first[1], want[1], rtol=2e-2, atol=2e-2)
        graph.replay()
        assert torch.equal(first[0], got[0]) == (p == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_compiles_in_one_graph(packed):
    step, qkv = gpu_step(packed, p=0.0)

    def forward(qkv):
        sequences = sequences_of([200, 64, 1, 129], "cuda") if packed else None
        return attention(*qkv.unbind(-3), sequences=sequences)

    got = torch.compile(forward, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(got, step(qkv)[0], rtol=1e-2, atol=1e-2)
