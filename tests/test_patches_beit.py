"""patch() on vision transformers built like BEiT's, and on timm's ModelEmaV2."""

import copy
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import vision_restated
from beit_style import Attention, Block, Mlp, ModelEmaV2, VisionTransformerForCyclicalTraining
from parity import relative

from d2v_fast.nn import TransformerEncoder
from d2v_fast.patches import PatchError, beit, patch
from d2v_fast.patches._core import Options, Patch, Site
from d2v_fast.patches.beit.engine import beit_loss, beit_targets

TOLERANCE = 1e-5
DIFFERS = "tried on random numbers, its result differs from ours by"


def model(**options):
    """Weights large enough for each part to show in the outputs."""
    torch.manual_seed(0)
    made = VisionTransformerForCyclicalTraining(**options)
    with torch.no_grad():
        for parameter in made.blocks.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def data(seed=0):
    """Images, and a mask of patches."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 6, 6, generator=g) < 0.5
    return torch.randn(3, 3, 24, 24, generator=g), mask


@contextmanager
def encoder_calls():
    """Counts forwards of our encoder."""
    with mock.patch.object(TransformerEncoder, "forward", autospec=True, side_effect=TransformerEncoder.forward) as spy:
        yield spy


def outputs(made, *call):
    """Results of one call, and the gradients that random ones of theirs give."""
    made.zero_grad()
    torch.manual_seed(5)  # DropPath draws the same
    out = made(*call)
    results = list(out) if isinstance(out, (list, tuple)) else [out]
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(results)]
    torch.autograd.backward(results, grads)
    return results, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def agree(got, want, tolerance=TOLERANCE):
    assert len(got) == len(want)
    names = want if isinstance(want, dict) else range(len(want))
    for name in names:
        assert got[name].dtype == want[name].dtype, name
        assert (got[name] - want[name]).norm() <= tolerance * want[name].norm() + 1e-12, name


@pytest.mark.parametrize(
    "options", [{}, {"shared": False}, {"scale": 0.0}, {"scale": 1e-4}, {"drop_path": 0.6}], ids=str
)
@pytest.mark.parametrize("parts", [{}, {"encoder": False}], ids=["whole", "parts"])
def test_same_numbers(options, parts):
    made = model(**options).train()
    plain = copy.deepcopy(made)
    patch(made, **parts)
    images, mask = data()
    calls = [(images, mask), (images, mask, True), (images, None, True, "end"), (images, mask, True, "fc")]
    with encoder_calls() as spy:
        for call in calls:
            (got, got_grads), (want, want_grads) = outputs(made, *call), outputs(plain, *call)
            agree(got, want)
            agree(got_grads, want_grads)
    assert spy.call_count == (0 if parts else len(calls))


def test_report():
    made = model()
    text = str(patch(made, teacher=ModelEmaV2(made)))
    assert text.splitlines()[0] == "d2v_fast on VisionTransformerForCyclicalTraining: 15 replaced, 0 left as they were"
    rows = [" ".join(line.split()) for line in text.splitlines()[1:]]
    blocks = "all blocks in fused operators: relative positions in attention; norms, LayerScale, DropPath, residuals, "
    blocks += "GELU; the student's last block at masked patches only"
    attention = "relative positions in the attention kernel, one bias for all images, no copies of q, k and v"
    step = "all averages in one pass; integer buffers are copied, not averaged"
    assert rows == [
        f"replaced 1 x VisionTransformerForCyclicalTraining.forward encoder {blocks}",
        f"replaced 3 x blocks.*.attn Attention.forward attention {attention}",
        "replaced 3 x blocks.*.mlp Mlp.forward norms bias and GELU in one pass",
        f"replaced 1 x teacher ModelEmaV2._update ema {step}",
        f"replaced 1 x teacher.module VisionTransformerForCyclicalTraining.forward encoder {blocks}",
        f"replaced 3 x teacher.module.blocks.*.attn Attention.forward attention {attention}",
        "replaced 3 x teacher.module.blocks.*.mlp Mlp.forward norms bias and GELU in one pass",
    ]


def test_revert():
    made = model()
    teacher = ModelEmaV2(made)
    images, mask = data()
    before, owners = outputs(made, images, mask), [*made.modules(), *teacher.modules()]
    insides = [dict(owner.__dict__) for owner in owners]
    keys = list(made.state_dict())
    with patch(made, teacher=teacher):
        outputs(made, images, mask)
        teacher.update(made)
        copied = copy.deepcopy(made)
        assert list(made.state_dict()) == keys
        agree(outputs(copied, images, mask)[0], before[0])
    assert [dict(owner.__dict__) for owner in owners] == insides
    after = outputs(made, images, mask)
    assert torch.equal(after[0][0], before[0][0])
    assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())
    assert torch.equal(outputs(copied, images, mask)[0][0], before[0][0])


def test_training_run():
    """An engine's loop, with a teacher made from the patched model, ends with the same weights."""

    def run(patched):
        made = model(drop_path=0.3).train()
        if patched:
            patch(made)
        teacher = ModelEmaV2(made, decay=0.5)  # of integers too, exactly
        if patched:
            patch(made, teacher=teacher)  # what is replaced already stays so
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
        losses = []
        for update in range(5):
            images, mask = data(update)
            torch.manual_seed(update)
            with torch.no_grad():
                results = teacher.module(images, None, True, "end")
            if patched:
                target = beit_targets(results, mask, target_layers=[1, 2])
                loss = beit_loss(made(images, mask), target)
            else:
                flat = mask.flatten(1)
                target = sum(F.layer_norm(x, x.shape[-1:]) for x in results[1:]) / 2
                loss = F.smooth_l1_loss(made(images, mask), F.layer_norm(target, target.shape[-1:])[flat], beta=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            teacher.update(made)
            losses.append(loss.detach())
        return losses, made.state_dict(), teacher.module.state_dict()

    for got, want in zip(run(True), run(False), strict=True):
        got, want = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (got, want))
        moved = {name: x for name, x in want.items() if x.is_floating_point()}
        agree({name: got[name] for name in moved}, moved, 1e-4)


def test_autocast():
    made = model().train()
    plain = copy.deepcopy(made)
    patch(made)
    images, mask = data()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = outputs(made, images, mask)[0], outputs(plain, images, mask)[0]
    assert got[0].dtype == want[0].dtype
    assert relative(got[0].float(), want[0].float()) <= 0.02


class OtherScale(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = self.scale * 2


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


def test_changes_after_the_patch():
    """Hooks, other rates and parts that somebody exchanges are followed."""
    made = model().train()
    plain = copy.deepcopy(made)
    result = patch(made)
    images, mask = data()
    for each in (made, plain):
        each.blocks[2].drop_path = type(model(drop_path=0.5).blocks[2].drop_path)(0.5)
    with encoder_calls() as spy:
        agree(outputs(made, images, mask)[0], outputs(plain, images, mask)[0])
    assert spy.call_count == 5 and not result.fallbacks()  # tried again four times, and called
    seen = []
    handle = made.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    agree(outputs(made, images, mask)[0], outputs(plain, images, mask)[0])
    assert len(seen) == 1
    key = ("VisionTransformerForCyclicalTraining.forward", "blocks.0 has hooks, which want to see it called")
    assert result.fallbacks() == {key: 1}
    handle.remove()
    agree(outputs(made, images, mask)[0], outputs(plain, images, mask)[0])
    assert result.fallbacks() == {key: 1}
    for each in (made, plain):
        each.double()
    agree(outputs(made, images.double(), mask)[0], outputs(plain, images.double(), mask)[0], 1e-12)


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


def test_no_masked_patch():
    made, (images, mask) = model(), data()
    patch(made)
    assert made(images, torch.zeros_like(mask)).shape == (0, 32)
    with pytest.raises(AttributeError):  # as without the patch
        made(images)


def test_arguments_that_ours_does_not_know():
    """Attention with one bias an image, and a result of another kind, are the original's."""
    made = model()
    plain = copy.deepcopy(made)
    result = patch(made)
    x, bias = torch.randn(2, 37, 32), torch.randn(2, 2, 37, 37)
    agree([made.blocks[0].attn(x, bias)], [plain.blocks[0].attn(x, bias)])
    agree([made.blocks[0].attn(x, rel_pos_bias=bias[:1])], [plain.blocks[0].attn(x, rel_pos_bias=bias[:1])])
    key = ("Attention.forward", "the bias is [2, 2, 37, 37], not one for all images")
    assert result.fallbacks() == {key: 1}


def test_ema():
    made = model()
    teacher = ModelEmaV2(made, decay=0.9)
    plain = copy.deepcopy(teacher)
    result = patch(teacher)
    for _ in range(3):
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        teacher.update(made)
        plain.update(made)
    index = "rel_pos_bias.relative_position_index"
    got, want = teacher.module.state_dict(), plain.module.state_dict()
    assert torch.equal(got[index], made.state_dict()[index])
    assert not torch.equal(want.pop(index), got.pop(index))  # timm averages integers, and rounds down
    agree(got, want)
    teacher.set(made)
    assert all(torch.equal(x, made.state_dict()[name].to(x.dtype)) for name, x in teacher.module.state_dict().items())
    assert not result.fallbacks()


def test_ema_that_ours_does_not_know():
    made = model()
    teacher = ModelEmaV2(made)
    result = patch(teacher)
    teacher._update(made, lambda e, m: torch.minimum(e, m))
    teacher._update(made, lambda e, m: e * e)
    teacher.update(model().bfloat16())
    teacher.module.double()
    teacher.update(made)
    assert result.fallbacks() == {
        ("ModelEmaV2._update", "its update is no average of two numbers"): 2,
        ("ModelEmaV2._update", "the student is in another dtype than float32, and timm rounds its share to that"): 1,
        ("ModelEmaV2._update", "the averages are in another dtype than float32"): 1,
    }
    with pytest.raises(PatchError, match="no average of two numbers"), patch(ModelEmaV2(made), strict=True) as strict:
        strict.applied[0].owner._update(made, lambda e, m: e * e)


def test_other_teachers():
    made = model()
    with pytest.raises(PatchError, match=r"teacher must be one of .*ModelEmaV2.* got Linear"):
        patch(made, teacher=torch.nn.Linear(1, 1))
    assert not any("_d2v_fast" in module.__dict__ for module in made.modules())
    assert len(patch(made, teacher=copy.deepcopy(made)).applied) == 14
    other = torch.nn.Module()
    other.module = model()
    result = patch(other.module, teacher=other)
    assert [s.reason for s in result.skipped if not s.harmless] == ["ours knows the step of timm's ModelEmaV2 alone"]
    assert len(result.applied) == 7


def test_damaged_index():
    """A teacher whose index was averaged before reads the same entries as without the patch."""
    made = model()
    with torch.no_grad():
        made.rel_pos_bias.relative_position_index.sub_(1).clamp_(min=0)
    plain = copy.deepcopy(made)
    patch(made)
    images, mask = data()
    agree(outputs(made, images, mask)[0], outputs(plain, images, mask)[0])


def test_at_classes():
    """What patch_all puts into classes serves instances that were made before and after."""
    made, plain = model(), model()
    images, mask = data()
    want = outputs(plain, images, mask)
    found = Patch("classes")
    kinds = {VisionTransformerForCyclicalTraining: "_model_seams", Attention: "_attention_seams", Mlp: "_mlp_seams"}
    sites = [Site("", kind, seam) for kind, name in kinds.items() for seam in getattr(beit, name)(kind)]
    with found.apply(sites, Options()), encoder_calls() as spy:
        for each in (made, model()):
            got = outputs(each, images, mask)
            agree(got[0], want[0])
            agree(got[1], want[1])
        assert not found.fallbacks()
    assert spy.call_count == 10  # each tried four times, and called once
    assert not any("_d2v_fast" in module.__dict__ for module in made.modules())
    assert all("." in name and callable(seams) for name, seams in beit.CLASSES.items())


def test_compile():
    made = model(depth=1).eval()
    plain = copy.deepcopy(made)
    patch(made)
    images, _ = data()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        agree(compiled(images, None, True, "end"), plain(images, None, True, "end"))
        with torch.compiler.set_stance("fail_on_recompile"):
            agree(compiled(images, None, True, "end"), plain(images, None, True, "end"))


def test_engine_functions():
    images, mask = data()
    made = model()
    results = made(images, None, True, "end")
    flat = mask.flatten(1)
    padded = [F.pad(x, (0, 0, 1, 0)) for x in results]  # with a class token
    want = vision_restated.targets(padded, 2)[flat]
    assert relative(beit_targets(results, mask, target_layers=[1, 2]), want) <= TOLERANCE
    assert relative(beit_targets(results, mask.long(), target_layers=[-2, -1]), want) <= TOLERANCE
    assert beit_targets(results).shape == (3, 36, 32)
    prediction = torch.randn_like(want).requires_grad_()
    loss = beit_loss(prediction, want)
    loss.backward()
    torch.testing.assert_close(loss, F.smooth_l1_loss(prediction, want, beta=2.0))
    torch.testing.assert_close(beit_loss(prediction, want, beta=0.0, scale=3.0), 3 * F.mse_loss(prediction, want))
    bad = [
        (ValueError, r"target_layers must be of 3 layers, got \[3\]", {"target_layers": [3]}),
        (ValueError, r"target_layers must be of 3 layers, got \[\]", {"target_layers": []}),
        (ValueError, r"mask must be \(3, 36\) patches, got \(3, 35\)", {"mask": flat[:, 1:]}),
        (TypeError, "mask must be a tensor, got list", {"mask": [1]}),
        (ValueError, "norm", {"norm": "other"}),
    ]
    for error, message, given in bad:
        with pytest.raises(error, match=message):
            beit_targets(results, **given)


def timm_models():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision's operators, where it does not fit PyTorch
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"use_shared_rel_pos_bias": True, "init_values": 0.1}, True),
        ({"use_rel_pos_bias": True, "use_abs_pos_emb": False, "global_pool": "token"}, True),
        ({"swiglu_mlp": True}, False),
        ({"qkv_bias": False}, False),
    ],
    ids=str,
)
def test_timm(options, whole):
    timm = timm_models()
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    made = timm.models.beit.Beit(**sizes, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    teacher = timm.utils.ModelEmaV2(made, decay=0.9)
    plain, plain_teacher = copy.deepcopy(made), copy.deepcopy(teacher)
    patch(made, teacher=teacher)
    images, _ = data()
    with encoder_calls() as spy:
        (got, got_grads), (want, want_grads) = outputs(made, images), outputs(plain, images)
    assert spy.call_count == whole
    agree(got, want)
    agree(got_grads, want_grads)
    for each, student in ((teacher, made), (plain_teacher, plain)):
        with torch.no_grad():
            student.cls_token.add_(1)
        each.update(student)
    agree(dict(teacher.module.state_dict()), dict(plain_teacher.module.state_dict()))
