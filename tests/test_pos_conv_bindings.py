"""The bindings of csrc/pos_conv.h refuse whatever the kernels would read or write wrongly."""

import pytest
import torch
from checks import DEVICE, INTERPRET

BF16 = torch.bfloat16
needs_emulator = pytest.mark.skipif(INTERPRET or DEVICE != "cpu", reason="kernels are emulated on the CPU only")


def binding_arguments(name):
    """Good arguments of one function of the bindings: 40 rows of 2 groups of 32 channels, kernel 3."""
    rows = {key: torch.zeros(40, 64, dtype=BF16) for key in ("x", "z", "grad", "grad_z", "below", "below_y", "out")}
    weight = torch.zeros(2, 3, 32, 32, dtype=BF16)
    sums, stats = (lambda: torch.zeros(40, 2, 2)), (lambda: torch.zeros(2, 40))
    tail = {"tiles": None, "frames": 20}
    return {
        "pos_conv_fwd_cuda": {
            "x": rows["x"], "sums": sums(), "stats": stats(), "weight": weight, "bias": torch.zeros(64), "z": rows["z"],
            "z_sums": sums(), **tail, "activate": True, "eps": 1e-5,
        },
        "pos_conv_dgrad_cuda": {
            "grad": rows["grad"], "z": rows["z"], "stats": stats(), "sums": sums(), "grad_z": rows["grad_z"],
            "weight": weight, "below": rows["below"], "below_stats": stats(), "out": rows["out"], "out_sums": sums(),
            "below_y": rows["below_y"], **tail,
        },
        "pos_conv_wgrad_cuda": {
            "grad": rows["grad"], "x": rows["x"], "weight_shares": torch.zeros(2, 2, 3, 32, 32),
            "bias_shares": torch.zeros(2, 64), "grad_weight": torch.zeros(64, 32, 3), "grad_bias": torch.zeros(64),
            **tail,
        },
    }[name]  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("name", ["pos_conv_fwd_cuda", "pos_conv_dgrad_cuda", "pos_conv_wgrad_cuda"])
def test_bindings_check_every_tensor(emulated, name):
    """Shape, dtype, contiguity, and the first byte of what is read 16 bytes at a time."""
    function, good = getattr(torch.ops.d2v_fast_emulated, name), binding_arguments(name)
    function(**good)
    for key, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        bad = {
            f"{key} must (have shape|be)": value[..., :-1].contiguous(),
            f"{key} must be (bfloat16|float32)": value.double(),
            f"{key} must be contiguous": torch.stack([value, value], -1)[..., 0],
        }
        if value.dtype == BF16 or key == "bias":
            shifted = torch.zeros(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
            bad[f"{key} must start at a multiple of 16 bytes"] = shifted
        for message, tensor in bad.items():
            with pytest.raises(RuntimeError, match=message if tensor.shape == value.shape else "must"):
                function(**{**good, key: tensor})


@needs_emulator
@pytest.mark.parametrize(
    "name,change,message",
    [
        ("fwd", {"x": torch.zeros(40, 40, dtype=BF16)}, "groups must leave 32, 48, 64 or 80 channels each, got 20"),
        ("fwd", {"x": torch.zeros(40, 65, dtype=BF16)}, "groups must divide the number of channels"),
        ("fwd", {"weight": torch.zeros(2, 0, 32, 32, dtype=BF16)}, "taps must be positive"),
        ("fwd", {"z": torch.zeros(39, 64, dtype=BF16)}, r"z must have shape \[40, 64\], got \[39, 64\]"),
        ("fwd", {"frames": 30}, "frames must divide the number of rows"),
        ("fwd", {"frames": 2**31, "tiles": torch.zeros(1, 3).long()}, "frames must fit in 32 bits"),
        ("fwd", {"tiles": torch.zeros(2, 2).long()}, r"tiles must have shape \[\*, 3\], got \[2, 2\]"),
        ("fwd", {"stats": None}, "stats must come with sums"),
        ("dgrad", {"grad_z": None}, "sums must come with z, stats and grad_z"),
        ("dgrad", {"z": None}, "sums must come with z, stats and grad_z"),
        ("dgrad", {"sums": None}, "sums must come with z, stats and grad_z"),
        ("dgrad", {"below_y": None}, "below_y must come with below"),
        ("dgrad", {"out_sums": None}, "out_sums must come with below and below_stats"),
        ("dgrad", {"below": None, "below_y": None}, "out_sums must come with below and below_stats"),
        ("wgrad", {"grad_bias": None}, "grad_bias must come with bias_shares"),
        ("wgrad", {"tiles": torch.zeros(1, 3)}, "tiles must be int64, got float32"),
    ],
)
def test_bindings_check_what_goes_together(emulated, name, change, message):
    name = f"pos_conv_{name}_cuda"
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.d2v_fast_emulated, name)(**{**binding_arguments(name), **change})
