"""patch() on vision transformers built like BEiT's: same numbers, the report, revert."""

import copy

import pytest
import torch
from beit_pairs import agree, data, encoder_calls, model, outputs
from beit_style import Attention, Mlp, ModelEmaV2, VisionTransformerForCyclicalTraining
from parity import relative

from d2v_fast.patches import beit, patch
from d2v_fast.patches._core import Options, Patch, Site


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
        f"replaced 1 x VisionTransformerForCyclicalTraining.forward encoder {blocks} never called",
        f"replaced 3 x blocks.*.attn Attention.forward attention {attention} never called",
        "replaced 3 x blocks.*.mlp Mlp.forward norms bias and GELU in one pass never called",
        f"replaced 1 x teacher ModelEmaV2._update ema {step} never called",
        f"replaced 1 x teacher.module VisionTransformerForCyclicalTraining.forward encoder {blocks} never called",
        f"replaced 3 x teacher.module.blocks.*.attn Attention.forward attention {attention} never called",
        "replaced 3 x teacher.module.blocks.*.mlp Mlp.forward norms bias and GELU in one pass never called",
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


def test_autocast():
    made = model().train()
    plain = copy.deepcopy(made)
    patch(made)
    images, mask = data()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = outputs(made, images, mask)[0], outputs(plain, images, mask)[0]
    assert got[0].dtype == want[0].dtype
    assert relative(got[0].float(), want[0].float()) <= 0.02


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
