"""Models that look like BEiT's and compute something else: trying them on random numbers finds out."""

import copy
from functools import partial

import pytest
import torch
from beit_pairs import TOLERANCE, agree, data, model, outputs
from beit_style import Attention, Block, Mlp, VisionTransformerForCyclicalTraining

from d2v_fast.patches import PatchError, patch

DIFFERS = "tried on random numbers, its result differs from ours by"


class PostNorm(Block):
    """The same parts, put together in another way."""

    def forward(self, x, rel_pos_bias=None):
        x = x + self.gamma_1 * self.norm1(self.attn(x, rel_pos_bias))
        z = self.gamma_2 * self.norm2(self.mlp(x))
        return x + z, z


class Parallel(Block):
    """Attention and MLP of the same input; LayerScale of 1e-4 hides it."""

    def forward(self, x, rel_pos_bias=None):
        z = self.gamma_2 * self.mlp(self.norm2(x))
        return x + self.gamma_1 * self.attn(self.norm1(x), rel_pos_bias) + z, z


class DoubledBias(Block):
    """A table of zeros hides it."""

    def forward(self, x, rel_pos_bias=None):
        return super().forward(x, 2 * rel_pos_bias)


class DroppedTwice(Mlp):
    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DrawnTwice(Attention):
    """How often attention's dropout is drawn is all that can be seen of it: ours has it in the kernel."""

    def forward(self, x, rel_pos_bias=None):
        self.attn_drop(x)
        return super().forward(x, rel_pos_bias)


class OtherResults(VisionTransformerForCyclicalTraining):
    def forward(self, x, bool_masked_pos=None, return_all_tokens=False, layer_results=None):
        results = super().forward(x, bool_masked_pos, return_all_tokens, layer_results)
        return tuple(results)[:-1] if layer_results == "fc" else results


def scaled():
    made = model()
    for block in made.blocks:
        block.attn.scale *= 2
    return made


def with_blocks(kind, dtype=torch.float32, middle=False, **options):
    """A model as it is built, with blocks of another kind, or one in the middle."""
    torch.manual_seed(0)
    made = VisionTransformerForCyclicalTraining(**options).to(dtype)
    for block in made.blocks[1:2] if middle else made.blocks:
        block.__class__ = type("Block", (kind,), {})
    return made


def untrained():
    made = with_blocks(DoubledBias)
    torch.nn.init.zeros_(made.rel_pos_bias.relative_position_bias_table)
    return made


def dropped_twice():
    made = model()
    for block in made.blocks:
        block.mlp.__class__ = type("Mlp", (DroppedTwice,), {})
        block.mlp.drop.p = block.attn.proj_drop.p = 0.5
    return made


def drawn_twice():
    made = model(dropout=0.2)
    for block in made.blocks:
        block.attn.__class__ = type("Attention", (DrawnTwice,), {})
    return made


def other_results():
    made = model()
    made.__class__ = OtherResults
    return made


def tanh():
    made = model()
    for block in made.blocks:
        block.mlp.act = torch.nn.GELU("tanh")
    return made


def adapters():
    made = model()

    class Adapted(torch.nn.Linear):
        pass

    made.blocks[1].attn.proj.__class__ = Adapted
    return made


def unscaled():
    made = model(drop_path=0.5)
    made.blocks[1].drop_path.scale_by_keep = False
    return made


def dropouts():
    made = model()
    made.blocks[1].attn.proj_drop.p = 0.1
    return made


@pytest.mark.parametrize(
    ("make", "reason", "left"),
    [
        (scaled, "it scales logits by 0.5", {"forward", "attn"}),
        (partial(with_blocks, PostNorm), DIFFERS, {"forward"}),
        (partial(with_blocks, PostNorm, middle=True), DIFFERS, {"forward"}),
        (partial(with_blocks, Parallel, scale=1e-4), DIFFERS, {"forward"}),
        (partial(with_blocks, Parallel, torch.bfloat16, scale=1.0), DIFFERS, {"forward"}),
        (untrained, DIFFERS, {"forward"}),
        (dropped_twice, DIFFERS, {"forward", "mlp"}),
        (drawn_twice, "it could not be tried: it calls attn_drop twice", {"forward", "attn"}),
        (other_results, "tried on random numbers, it returns another number of results", {"forward"}),
        (tanh, "its activation is not the exact GELU", {"forward", "mlp"}),
        (adapters, "proj is a Adapted", {"forward", "attn"}),
        (unscaled, "its DropPath does not scale what it keeps", {"forward"}),
        (dropouts, "dropout is not the same everywhere: 0.0, 0.1", {"forward"}),
    ],
)
def test_other_code_stays(make, reason, left):
    """Models that look like BEiT's and are not: what does not fit is left, the rest replaced, numbers are the same."""
    made = make().eval()
    plain = copy.deepcopy(made)
    images, mask = data()
    images = images.to(made.lm_head.weight.dtype)
    with pytest.raises(PatchError, match="strict=True"):
        patch(made, strict=True)
    result = patch(made)
    assert any(reason in skipped.reason for skipped in result.skipped), result
    names = {
        "forward" if ".forward" in s.name and "blocks" not in s.name else s.name.split()[0].split(".")[-1]
        for s in result.skipped
    }
    assert names == left
    rounding = TOLERANCE if images.dtype == torch.float32 else 0.02
    agree(outputs(made, images, mask)[0], outputs(plain, images, mask)[0], rounding)
    result.revert()
    assert not any("_d2v_fast" in module.__dict__ for module in made.modules())


@pytest.mark.parametrize("shared", [True, False])
def test_dropouts_that_fit(shared):
    made = model(dropout=0.2, shared=shared, drop_path=0.3)
    for block in made.blocks:
        block.mlp.drop.p = block.attn.proj_drop.p = 0.1
    assert len(patch(made, strict=True).applied) == 7


def test_dropout_after_the_patch():
    """A dropout that the MLP calls twice matters as soon as it has a rate."""
    made = dropped_twice().train()
    for block in made.blocks:
        block.mlp.drop.p = 0.0
    result = patch(made, encoder=False)
    x = torch.randn(2, 37, 32)
    made.blocks[0].mlp(x)
    assert not result.fallbacks()
    made.blocks[0].mlp.drop.p = 0.5
    made.blocks[0].mlp(x)
    assert [name for name, reason in result.fallbacks() if DIFFERS in reason] == ["Mlp.forward"]


def test_trial_leaves_no_trace():
    """It is made on a copy: no random number is taken, nobody's hook is called, no attribute is another."""
    made = model(drop_path=0.5).bfloat16().train()
    made.seen = made.cls_token * 2  # with a history, which Python's deepcopy refuses
    made.register_forward_hook(lambda *args: pytest.fail("called"))
    before, insides = torch.get_rng_state(), [dict(owner.__dict__) for owner in made.modules()]
    state = {name: x.clone() for name, x in made.state_dict().items()}
    result = patch(made)
    assert len(result.applied) == 7 and not result.skipped
    assert torch.equal(torch.get_rng_state(), before) and torch.backends.mkldnn.enabled
    assert all(torch.equal(x, state[name]) for name, x in made.state_dict().items())
    result.revert()
    assert [dict(owner.__dict__) for owner in made.modules()] == insides
