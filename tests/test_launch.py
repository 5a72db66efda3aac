"""What launchers promise their kernels about alignment: a wrong promise is a misaligned access on a GPU."""

import pytest
import torch
from checks import DEVICE

pytest.importorskip("triton")

from d2v_fast.kernels import adamw_ema, data2vec_loss, ema, l2_norm, launch, layer_targets

BF16 = torch.bfloat16


class Spy:
    """Stands in for a kernel and keeps what it is told."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.options.append(options)


@pytest.fixture
def promises(monkeypatch):
    """The values of ALIGNED of all launches so far, from kernels that do not run."""
    spies = []
    for module in (adamw_ema, data2vec_loss, ema, l2_norm, launch, layer_targets):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            spies.append(Spy())
            monkeypatch.setattr(module, name, spies[-1])
    return lambda: [options["ALIGNED"] for spy in spies for options in spy.options if "ALIGNED" in options]


def tensor(shift: int, dtype=torch.float32, shape=(2, 6, 16)) -> torch.Tensor:
    """Contiguous, ``shift`` elements past a vector boundary."""
    return torch.zeros(2000, dtype=dtype, device=DEVICE)[shift : shift + torch.Size(shape).numel()].view(shape)


def test_aligned_means_every_tensor():
    assert launch.aligned([tensor(0), tensor(4), tensor(8, BF16)])
    for shift, dtype in ((1, torch.float32), (2, torch.float32), (4, BF16)):
        assert not launch.aligned([tensor(0), tensor(shift, dtype), tensor(0)])


@pytest.mark.parametrize("shift,expected", [(0, True), (8, True), (1, False), (4, False)])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("norm,launches", [("instance", 2), ("layer", 1)])
def test_loss_and_targets(promises, norm, launches, which, shift, expected):
    layers = [tensor(shift if i == which else 0, BF16) for i in range(2)]
    positions = torch.tensor([1, 7, 9], device=DEVICE)
    layer_targets.layer_targets(layers, positions, None, norm, "none", 1e-5)
    pred = tensor(0, BF16, (3, 16))
    data2vec_loss.data2vec_loss_fwd(pred, layers, positions, None, None, norm, "none", 0.0, 1.0, 1e-5, True)
    assert promises() == [expected] * 2 * launches


@pytest.mark.parametrize("which", [None, "teacher", "student", "copies"])
def test_ema(promises, which):
    lists = [[tensor(0), tensor(which == name), tensor(0)] for name in ("teacher", "student", "copies")]
    teacher, student, copies = lists
    ema.ema_update_(teacher, student, None, 0.1, copies)
    assert promises() == ([True] if which is None else [True, False])


@pytest.mark.parametrize("shift,expected", [(0, [True]), (2, [True, False])])
def test_l2_norm(promises, shift, expected):
    l2_norm.l2_norm([tensor(0), tensor(shift)])
    assert promises() == expected


@pytest.mark.parametrize("which", [None, *adamw_ema.Tensors._fields])
def test_adamw_ema(promises, which):
    tensors = adamw_ema.Tensors(*([tensor(0), tensor(name == which)] for name in adamw_ema.Tensors._fields))
    step = torch.zeros((), device=DEVICE)
    hyper = adamw_ema.Hyper(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, ema_decay=0.9, fairseq_eps=False)
    adamw_ema.adamw_ema_(tensors, [step], [0.0, 0.0], hyper)
    assert promises() == ([True] if which is None else [True, False])
