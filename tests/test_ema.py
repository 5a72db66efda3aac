import sys

import numpy as np
import pytest
import torch
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import ema_update_
from d2v_fast.ops.ema import ema_update_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# scalar, empty, below / at / above a block and a chunk of the GPU and of the interpreter configuration
SHAPES = [(), (0,), (7,), (1024,), (33, 31), (16, 1024), (16385,), (3, 5, 4, 300), (70000,)]


def make(shapes=SHAPES, student_dtype=F32):
    teacher = [torch.randn(s, device=DEVICE) for s in shapes]
    student = [torch.randn(s).to(DEVICE, student_dtype) for s in shapes]
    return teacher, student


def updated(teacher, student, decay, dtype):
    return [torch.lerp(e.to(dtype), p.to(dtype), 1 - decay) for e, p in zip(teacher, student, strict=True)]


@pytest.mark.parametrize("decay", [0.999, 0.99999, 0.3])
@pytest.mark.parametrize("student_dtype", [F32, BF16, F16])
def test_matches_fp64(student_dtype, decay):
    teacher, student = make(student_dtype=student_dtype)
    before = [p.clone() for p in student]
    eager = updated(teacher, student, decay, F32)
    exact = updated(teacher, student, decay, torch.float64)
    moved = [x - e.double() for x, e in zip(exact, teacher, strict=True)]
    start = [e.double() for e in teacher]
    ema_update_(teacher, student, decay)
    for i, e in enumerate(teacher):
        assert_as_accurate_as_eager(e, eager[i], exact[i], floor=1e-7)
        if decay == 0.3 and e.numel() > 0:  # the size of the step itself, where rounding does not hide it
            torch.testing.assert_close(e.double() - start[i], moved[i], rtol=1e-4, atol=1e-6)
        assert torch.equal(student[i], before[i])


@pytest.mark.parametrize("copy_dtype", [BF16, F16, F32])
def test_copies_are_the_rounded_teacher(copy_dtype):
    teacher, student = make(student_dtype=BF16)
    copies = [torch.full_like(e, float("nan"), dtype=copy_dtype) for e in teacher]
    want = updated(teacher, student, 0.9, F32)
    assert ema_update_(teacher, student, 0.9, copies=copies) is None
    torch.testing.assert_close(teacher, want)
    assert all(torch.equal(c, e.to(copy_dtype)) for c, e in zip(copies, teacher, strict=True))


def test_mixed_dtypes_in_one_call():
    teacher, _ = make(SHAPES * 2)
    student = [torch.randn_like(e, dtype=(F32, BF16, F16)[i % 3]) for i, e in enumerate(teacher)]
    copies = [torch.empty_like(e, dtype=(F16, BF16)[i % 2]) for i, e in enumerate(teacher)]
    want = updated(teacher, student, 0.7, F32)
    ema_update_(tuple(teacher), iter(student), 0.7, copies=copies)
    torch.testing.assert_close(teacher, want)
    assert all(torch.equal(c, e.to(c.dtype)) for c, e in zip(copies, teacher, strict=True))


def test_unaligned_tensors():
    """Views into flat buffers start anywhere, and their neighbours stay as they are."""
    flat, other = torch.randn(70003, device=DEVICE), torch.randn(70003, device=DEVICE).bfloat16()
    before = flat.clone()
    teacher, student = [flat[1:2050], flat[2051:69999]], [other[3:2052], other[2053:70001]]
    want = updated(teacher, student, 0.8, F32)
    ema_update_(teacher, student, 0.8)
    torch.testing.assert_close(teacher, want)
    outside = torch.tensor([0, 2050, 69999, 70002], device=DEVICE)
    assert torch.equal(flat[outside], before[outside])


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_decay_tensor(dtype):
    teacher, student = make()
    want = [e.clone() for e in teacher]
    decay = torch.tensor(0.9999, dtype=dtype, device=DEVICE)
    ema_update_(teacher, student, decay)
    ema_update_ref(want, student, decay)
    torch.testing.assert_close(teacher, want, rtol=2e-7, atol=1e-7)
    decay.fill_(1.0)  # the value counts, not the object
    kept = [e.clone() for e in teacher]
    ema_update_(teacher, student, decay)
    assert all(torch.equal(e, k) for e, k in zip(teacher, kept, strict=True))


def test_float_decay_keeps_its_precision():
    """1 - 0.99999 taken in float32 would be off by 1e-3."""
    teacher, student = [torch.zeros(100, device=DEVICE)], [torch.full((100,), 1e5, device=DEVICE)]
    ema_update_(teacher, student, 0.99999)
    torch.testing.assert_close(teacher[0], torch.ones(100, device=DEVICE), rtol=1e-6, atol=0)


def test_numpy_decay():
    teacher, student = make([(5,)])
    want = updated(teacher, student, 0.25, F32)
    ema_update_(teacher, student, np.float32(0.25))
    torch.testing.assert_close(teacher, want)


def test_exact_ends_and_fixed_point():
    teacher, student = [torch.tensor([1e8, -3.0, 0.1], device=DEVICE)], [torch.tensor([1.0, 7.0, 1e-9], device=DEVICE)]
    kept = teacher[0].clone()
    ema_update_(teacher, student, 1.0)
    assert torch.equal(teacher[0], kept)
    ema_update_(teacher, student, 0.0)
    assert torch.equal(teacher[0], student[0])
    for decay in (0.123, 0.9999):
        ema_update_(teacher, student, decay)
        assert torch.equal(teacher[0], student[0])


def test_nan_stays_in_its_element():
    teacher, student = make([(2000,)])
    student[0][1500] = float("nan")
    ema_update_(teacher, student, 0.9)
    assert teacher[0].isnan().nonzero().tolist() == [[1500]]


def test_other_tensors_at_the_next_call():
    """Whatever is remembered about one call must not be used for another."""
    teacher, student = make([(100,), (50,)])
    for _ in range(3):
        want = updated(teacher, student, 0.5, F32)
        ema_update_(teacher, student, 0.5)
        torch.testing.assert_close(teacher, want)
        student = [torch.randn_like(p) for p in student]
    prefix_teacher, prefix_student = [teacher[0][:64]], [student[0][:64]]  # same addresses, fewer elements
    want = [*updated(prefix_teacher, prefix_student, 0.5, F32), teacher[0][64:].clone()]
    ema_update_(prefix_teacher, prefix_student, 0.5)
    torch.testing.assert_close(teacher[0], torch.cat(want))
    ema_update_(list(reversed(teacher)), list(reversed(student)), 0.0)
    assert all(torch.equal(e, p) for e, p in zip(teacher, student, strict=True))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_table_is_built_once_per_set_of_addresses():
    from d2v_fast.kernels import ema as kernels

    teacher, student = make()
    kernels._launches.cache_clear()
    for _ in range(3):
        ema_update_(teacher, student, 0.5)
    assert kernels._launches.cache_info()[:2] == (2, 1)  # hits, misses


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("chunk,block", [(64, 16), (32, 32)])
def test_every_tile_gives_the_same_answer(chunk, block):
    from d2v_fast.kernels import ema as kernels
    from d2v_fast.kernels.chunks import LaunchConfig

    teacher, student = make([(7,), (64,), (130,)], BF16)
    copies = [torch.empty_like(p) for p in student]
    want = updated(teacher, student, 0.9, F32)
    decay = torch.tensor(0.9, device=DEVICE)
    kernels.ema_update_(teacher, student, decay, 0.0, copies, LaunchConfig(chunk, block, num_warps=4))
    torch.testing.assert_close(teacher, want)
    assert all(torch.equal(c, e.bfloat16()) for c, e in zip(copies, teacher, strict=True))


def test_empty_lists_and_gradients():
    ema_update_([], [], 0.5)
    ema_update_([torch.empty(0, device=DEVICE)], [torch.empty(0, device=DEVICE)], 0.5)
    teacher, student = make([(5,)])
    want = updated(teacher, student, 0.5, F32)
    ema_update_([teacher[0].requires_grad_()], [student[0].requires_grad_()], 0.5)  # both leaves
    assert torch.equal(teacher[0].detach(), want[0]) and teacher[0].grad_fn is None


@pytest.mark.parametrize("written", ["teacher", "copies"])
def test_mutation_is_visible_to_autograd(monkeypatch, written):
    """By the op itself: PyTorch's operators in the reference would tell autograd as well, a kernel does not."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.ema"], "ema_update_ref", lambda *args: None)
    teacher, student = make([(5,)])
    copies = [torch.zeros(5, device=DEVICE)]
    x = torch.ones(5, device=DEVICE, requires_grad=True)
    y = (x * {"teacher": teacher, "copies": copies}[written][0]).sum()
    ema_update_(teacher, student, 0.5, copies=copies)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_permuted_tensors():
    """Dense in another order than the dimensions': the neighbours are those in memory."""
    teacher, student = [torch.randn(2, 3, 4, 5, device=DEVICE)], [torch.randn(2, 3, 4, 5, device=DEVICE)]
    last = [[x.to(memory_format=torch.channels_last) for x in xs] for xs in (teacher, student)]
    copies = [torch.empty_like(last[0][0], dtype=BF16)]
    want = updated(teacher, student, 0.3, F32)
    ema_update_(*last, 0.3, copies=copies)
    torch.testing.assert_close(last[0], want)
    assert torch.equal(copies[0], want[0].bfloat16())
    one = [torch.randn(6, 1, device=DEVICE).as_strided((6, 1), (1, 77)), torch.randn(6, 1, device=DEVICE)]
    want = updated(one[:1], one[1:], 0.3, F32)  # the stride of a dimension of one element says nothing
    ema_update_(one[:1], one[1:], 0.3)
    torch.testing.assert_close(one[:1], want)


@pytest.mark.parametrize("shifted", [None, "teacher", "student", "copies"])
def test_kernel_is_told_of_tensors_that_are_not_aligned(monkeypatch, shifted):
    """Else a GPU would read vectors from addresses that are no multiple of 16; the interpreter does not care."""
    pytest.importorskip("triton")
    from d2v_fast.kernels import ema as kernels

    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: told.append(options["ALIGNED"])

    monkeypatch.setattr(kernels, "_ema_update_kernel", Kernel())
    lists = {
        name: [torch.zeros(72, dtype=dtype, device=DEVICE)[int(name == shifted) :][:64]]
        for name, dtype in (("teacher", F32), ("student", F32), ("copies", BF16))
    }
    kernels.ema_update_(lists["teacher"], lists["student"], None, 0.5, lists["copies"])
    assert told == [shifted is None]


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_float64_masters():
    teacher, student = [torch.randn(9, dtype=torch.float64)], [torch.randn(9)]
    want = updated(teacher, student, 0.9, torch.float64)
    ema_update_(teacher, student, 0.9)
    torch.testing.assert_close(teacher, want)
    teacher, student = [torch.randn(9)], [torch.randn(9, dtype=torch.float64)]
    copies = [torch.empty(9, dtype=torch.float64)]
    want = updated(teacher, student, 0.9, F32)
    ema_update_(teacher, student, 0.9, copies=copies)
    torch.testing.assert_close(teacher, want)
    ema_update_(teacher, [want[0].clone()], 1.0, copies=copies)
    assert torch.equal(copies[0], teacher[0].double())


def test_opcheck():
    decay = torch.tensor(0.5, device=DEVICE)
    teacher, student = make([(5,), (3, 2)])
    torch.library.opcheck(torch.ops.d2v_fast.ema_update_.default, (teacher, student, decay, 0.0, []))
    torch.library.opcheck(
        torch.ops.d2v_fast.ema_update_.default, (teacher, student, None, 0.5, [e.bfloat16() for e in teacher])
    )


def test_compile_fullgraph():
    teacher, student = make([(5,), (3, 2)])
    copies = [torch.zeros_like(e, dtype=BF16) for e in teacher]
    want = [e.clone() for e in teacher]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(teacher, student, copies, decay):
        ema_update_(teacher, student, decay, copies=copies)
        return teacher[0] * 2

    decay = torch.tensor(0.25, device=DEVICE)
    doubled = step(teacher, student, copies, decay)
    ema_update_ref(want, student, decay)
    torch.testing.assert_close(teacher, want)
    torch.testing.assert_close(doubled, want[0] * 2)
    assert all(torch.equal(c, e.bfloat16()) for c, e in zip(copies, teacher, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=6),
    st.floats(0.0, 1.0),
    st.sampled_from([F32, BF16, F16]),
    st.booleans(),
)
def test_any_sizes_and_decays(sizes, decay, student_dtype, with_copies):
    teacher, student = make([(n,) for n in sizes], student_dtype)
    copies = [torch.full_like(e, float("nan"), dtype=BF16) for e in teacher] if with_copies else None
    exact = updated(teacher, student, decay, torch.float64)
    ema_update_(teacher, student, decay, copies=copies)
    for i, e in enumerate(teacher):
        torch.testing.assert_close(e.double(), exact[i], rtol=2e-7, atol=4e-7)
        assert copies is None or torch.equal(copies[i], e.bfloat16())


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda e, p: ema_update_(e, p[:1], 0.5), ValueError, "student must hold 2 tensors like teacher, got 1"),
        (lambda e, p: ema_update_(e, p, 0.5, copies=e[:1]), ValueError, "copies must hold 2 tensors .*, got 1"),
        (lambda e, p: ema_update_(e, p, 1.1), ValueError, r"decay must lie in \[0, 1\], got 1.1"),
        (lambda e, p: ema_update_(e, p, float("nan")), ValueError, "decay must lie in .* got nan"),
        (lambda e, p: ema_update_(e, p, torch.ones(1)), ValueError, r"decay must have shape \[\], got \(1,\)"),
        (lambda e, p: ema_update_(e, p, torch.tensor(1)), TypeError, "decay must be .* got torch.int64"),
        (lambda e, p: ema_update_(e, p, torch.ones((), device="meta")), ValueError, "decay must be on .* got meta"),
        (lambda e, p: ema_update_(e, p[::-1], 0.5), ValueError, r"student\[0\] must have shape \(4, 6\) .* got \(8,\)"),
        (lambda e, p: ema_update_([e[0], e[1].long()], p, 0.5), TypeError, r"teacher\[1\].*int64: copy such tensors"),
        (lambda e, p: ema_update_([e[0], e[1].half()], p, 0.5), TypeError, r"teacher\[1\].*float16: pass it as a copy"),
        (lambda e, p: ema_update_(e, [p[0], p[1].int()], 0.5), TypeError, r"student\[1\] must be float32.*int32"),
        (lambda e, p: ema_update_([e[0][:, 1:]], [p[0][:, 1:]], 0.5), ValueError, r"teacher\[0\] must be dense"),
        (
            lambda e, p: ema_update_([e[0]], [p[0].t().contiguous().t()], 0.5),
            ValueError,
            r"student\[0\].*strides \(6, 1",
        ),
        (
            lambda e, p: ema_update_([e[0].t()], [p[0].t().contiguous()], 0.5),
            ValueError,
            r"student\[0\].*strides \(1, 6",
        ),
        (lambda e, p: ema_update_([None], [p[0]], 0.5), TypeError, r"teacher\[0\] must be a tensor, got NoneType"),
        (lambda e, p: ema_update_(e, [p[0], 1.0], 0.5), TypeError, r"student\[1\] must be a tensor, got float"),
        (lambda e, p: ema_update_(e, p, 0.5, copies=[None] * 2), TypeError, r"copies\[0\] must be a tensor, got None"),
        (lambda e, p: ema_update_(e[1], p[1], 0.5), TypeError, "teacher must be a list of tensors, got Tensor"),
        (lambda e, p: ema_update_(e, p, None), TypeError, "decay must be a number, got NoneType"),
        (lambda e, p: ema_update_(e, p, "0.5"), TypeError, "decay must be a number, got str"),
        (lambda e, p: ema_update_(e, p, 0.5, copies=[p[0], p[1].to("meta")]), ValueError, r"copies\[1\] must be on"),
        (lambda e, p: ema_update_(e, e, 0.5), ValueError, "must not share memory"),
        (lambda e, p: ema_update_(e, p, 0.5, copies=p), ValueError, "must not share memory"),
        (lambda e, p: ema_update_([e[1], e[1]], [p[1], p[1]], 0.5), ValueError, "must not share memory"),
        (lambda e, p: ema_update_([e[1][:5]], [e[1][3:]], 0.5), ValueError, "must not share memory"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    teacher, student = make([(4, 6), (8,)])
    kept = [e.clone() for e in teacher]
    with pytest.raises(error, match=match):
        call(teacher, student)
    assert all(torch.equal(e, k) for e, k in zip(teacher, kept, strict=True))


def test_float64_beside_float32_teacher_raises():
    teacher, student = make([(4,), (4,)])
    with pytest.raises(TypeError, match=r"teacher\[1\] must "):
        ema_update_([teacher[0], teacher[1].double()], student, 0.5)


def test_tied_student_and_neighbouring_views_are_fine():
    flat, source = torch.randn(10, device=DEVICE), torch.randn(5, device=DEVICE)
    ema_update_([flat[:5], flat[5:]], [source, source], 0.0)
    assert torch.equal(flat, source.repeat(2))


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("student_dtype", [F32, BF16])
def test_fallback_on_a_gpu_without_triton(monkeypatch, student_dtype, tensor):
    """The implementation that CUDA tensors get; without Triton it is PyTorch's own operators on any device."""
    module = sys.modules["d2v_fast.ops.ema"]
    monkeypatch.setattr(module, "has_triton", lambda: False)
    teacher, student = make(student_dtype=student_dtype)
    copies = [torch.empty_like(e, dtype=BF16) for e in teacher]
    want = updated(teacher, student, 0.75, F32)
    decay = torch.tensor(0.75, device=DEVICE) if tensor else None
    module._op_cuda(teacher, student, decay, 0.0 if tensor else 0.75, copies)
    for e, w, c in zip(teacher, want, copies, strict=True):
        assert torch.equal(e, w) and torch.equal(c, w.bfloat16())


def test_repeats_bit_for_bit():
    teacher, student = make(student_dtype=BF16)
    runs = []
    for _ in range(2):
        again, copies = [e.clone() for e in teacher], [torch.empty_like(p) for p in student]
        ema_update_(again, student, 0.999, copies=copies)
        runs.append([*again, *copies])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    teacher, student = make(student_dtype=BF16)
    copies = [torch.empty_like(p) for p in student]
    decay = torch.tensor(0.5, device=DEVICE)
    ema_update_(teacher, student, decay, copies=copies)  # compiles
    with no_synchronisation():
        ema_update_(teacher, student, decay, copies=copies)
        ema_update_(teacher, student, 0.5)  # builds another table


@pytest.mark.gpu
def test_captured_graph_follows_decay():
    teacher, student = make()
    decay = torch.tensor(1.0, device=DEVICE)
    ema_update_(teacher, student, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(teacher, student, decay)
    decay.fill_(0.25)
    want = updated(teacher, student, 0.25, F32)
    graph.replay()
    torch.testing.assert_close(teacher, want)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    if torch.cuda.mem_get_info()[0] < 13 * 2**30:
        pytest.skip("needs 13 GB of GPU memory")
    size = 2**31 + 5
    teacher, student = torch.zeros(size, device=DEVICE), torch.ones(size, device=DEVICE, dtype=BF16)
    ema_update_([teacher], [student], 0.5)
    assert teacher.aminmax() == (0.5, 0.5)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_runs_the_kernel(monkeypatch):
    """Guards the suite itself: the CPU key must not fall back to the reference here."""
    from d2v_fast.ops import ema

    monkeypatch.setattr(ema, "ema_update_ref", None)
    teacher, student = make([(5,)])
    ema_update_(teacher, student, 0.0)
    assert torch.equal(teacher[0], student[0])
