"""The drop-in under transformers: attention by name, and masks of every kind."""

import pytest
import torch
from parity import TOLERANCE, relative
from torch import nn
from transformers_models import WIDTHS, batch, make, run, same, transformers

from d2v_fast.patches import patch
from d2v_fast.patches.transformers import register_attention


@pytest.mark.parametrize("name", ["wav2vec2", "text"])
def test_attention_implementation(name):
    register_attention()
    model, inputs = make(name), batch(name, padded=True)
    other = make(name, attn_implementation="d2v_fast")
    other.load_state_dict(model.state_dict())
    want = run(model, inputs)
    same(run(other, inputs), want)
    with patch(other) as handle:
        same(run(other, inputs), want)
        assert not handle.fallbacks()


def test_attention_implementation_of_other_models():
    register_attention()
    sizes = WIDTHS | {"vocab_size": 40, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    tokens, mask = torch.randint(4, 40, (2, 20)), (torch.arange(20) < torch.tensor([[20], [13]])).long()
    for kind in ("Bert", "Llama"):  # the second is causal, with fewer heads of keys: SDPA's
        extra = {"num_key_value_heads": 1} if kind == "Llama" else {}
        config = getattr(transformers, f"{kind}Config")(**sizes, **extra)
        model = getattr(transformers, f"{kind}Model")(config)
        want = run(model, {"input_ids": tokens, "attention_mask": mask})
        model.set_attn_implementation("d2v_fast")
        same(run(model, {"input_ids": tokens, "attention_mask": mask}), want)


def queries_keys_values():
    return torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()


def attention_module():
    module = nn.Module()
    module.is_causal = False
    return module


def attend(**given):
    """What "d2v_fast" gives for attention that knows no order, with more arguments."""
    register_attention()
    run_it = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["d2v_fast"]
    return run_it(attention_module(), *queries_keys_values(), None, **given)[0]


@pytest.mark.parametrize(
    "name", ["s_aux", "sinks", "softcap", "indices", "block_indices", "head_mask", "cu_seq_lens_q"]
)
def test_attention_implementation_refuses_what_it_does_not_know(name):
    with pytest.raises(ValueError, match=f"d2v_fast.* cannot serve Module: it does not know the argument {name};"):
        attend(**{name: torch.ones(2)})


def test_attention_implementation_knows():
    want = attend()
    given = {"position_ids": torch.arange(6)[None], "sliding_window": 4, "use_cache": False, "labels": torch.ones(2)}
    assert torch.equal(attend(**given, s_aux=None, softcap=None), want)
    bias = torch.randn(1, 2, 6, 6)
    assert relative(attend(position_bias=bias), attend(position_bias=0 * bias)) > 0.1
    assert relative(attend(position_bias=0 * bias), want) <= TOLERANCE


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_implementation_refuses_models():
    register_attention()
    sizes = {"d_model": 32, "vocab_size": 40, "encoder_layers": 1, "decoder_layers": 1, "block_size": 4}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_global_tokens": 2}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "attn_implementation": "d2v_fast"}
    model = transformers.PegasusXModel(transformers.PegasusXConfig(**sizes))
    tokens = torch.randint(4, 40, (2, 8))
    with pytest.raises(ValueError, match="PegasusXPreTrainedModel does not support SDPA; load"):
        model(input_ids=tokens, decoder_input_ids=tokens)


def test_attention_implementation_compiled():
    torch.compiler.reset()
    want = attend()
    module, (q, k, v) = attention_module(), queries_keys_values()
    run_it = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["d2v_fast"]
    compiled = torch.compile(lambda *given: run_it(module, *given, None)[0], backend="aot_eager", fullgraph=True)
    assert relative(compiled(q, k, v), want) <= TOLERANCE


def test_attention_implementation_scales_as_asked():
    q, k, v = queries_keys_values()
    want = torch.softmax(0.9 * q @ k.transpose(-1, -2), -1) @ v
    assert relative(attend(scaling=0.9), want.transpose(1, 2)) <= TOLERANCE


def test_masks_of_shifted_keys_are_those_of_sdpa():
    register_attention()
    masking = transformers.masking_utils
    asked = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": masking.bidirectional_mask_function}
    asked |= {"attention_mask": torch.arange(6) < torch.tensor([[6], [4]]), "q_offset": 0, "kv_offset": 2}
    want, got = (masking.ALL_MASK_ATTENTION_FUNCTIONS[name](**asked) for name in ("sdpa", "d2v_fast"))
    assert torch.equal(got, want)
    assert not torch.equal(want[:, 0, 0], asked["attention_mask"])


@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_a_sequence_without_tokens(how, switches):
    model, inputs = make("text", attn_implementation=how), batch("text", padded=True)
    inputs["attention_mask"][0] = 0
    want = run(model, inputs)
    with patch(model, **switches) as handle:
        same(run(model, inputs), want)
        assert ("a sequence has no tokens" in str(handle.fallbacks())) == (not switches)


def test_a_sequence_without_tokens_in_attention_by_name():
    register_attention()
    model, inputs = make("text", attn_implementation="sdpa"), batch("text", padded=True)
    inputs["attention_mask"][0] = 0
    want = run(model, inputs)
    model.set_attn_implementation("d2v_fast")
    same(run(model, inputs), want)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
def test_eager_attention_adds_masks_of_any_kind(switches, expanded):
    model, inputs = make("text", attn_implementation="eager"), batch("text")
    mask = torch.rand(2, 1, 1, 20).expand(2, 1, 20, 20) if expanded else torch.rand(2, 1, 20, 20)
    inputs["attention_mask"] = mask > 0.5
    want = run(model, inputs)
    with patch(model, **switches) as handle:
        same(run(model, inputs), want)
        assert "eager attention adds its mask" in str(handle.fallbacks())


@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
def test_masks_of_each_query(switches):
    model, inputs = make("text"), batch("text")
    inputs["attention_mask"] = (torch.rand(2, 1, 20, 20) > 0.5) | torch.eye(20, dtype=torch.bool)
    want = run(model, inputs)
    with patch(model, **switches):
        same(run(model, inputs), want)


def test_decoders_do_not_see_what_follows():
    model, inputs = make("text", "ForCausalLM", is_decoder=True).eval(), batch("text")
    with torch.no_grad():
        want = model(**inputs).logits
        with patch(model) as handle:
            assert relative(model(**inputs).logits, want) <= TOLERANCE
            assert "it is causal" in str(handle.fallbacks())
