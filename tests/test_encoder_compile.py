"""torch.compile(fullgraph=True) of the encoder, forward and backward, against the encoder without it."""

import pytest
import torch
from test_encoder_packed import MASKED, VALID, T, among, encoder_of

from d2v_fast.nn.sequences import Sequences

CASES = {  # modality, arguments, options of the encoder
    "speech padded": ("speech", "padded", {"pos_conv_depth": 2, "layers": 1}),
    "text packed, selected": ("text", "packed", {"checkpointing": "selective", "layers": 2}),
    "image selected": ("image", "selected", {"layers": 1}),
}


def arguments(layout: str) -> tuple[torch.Tensor, dict]:
    x, packing = torch.randn(3, T, 32), Sequences.from_mask(VALID)
    if layout == "packed":
        return packing.take(x.flatten(0, 1)), {"sequences": packing, "select": among(MASKED, packing)}
    if layout == "padded":
        return x, {"padding_mask": torch.from_numpy(~VALID)}
    return x, {"select": Sequences.from_mask(MASKED)} if layout == "selected" else {}


def compiled(encoder):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of what other tests of this process compiled
    return torch.compile(encoder, fullgraph=True, backend="aot_eager")


def run(call, encoder, x, options):
    encoder.zero_grad()
    output = call(x, top_k=1, **options)
    upstream = torch.randn(output.x.shape, generator=torch.Generator().manual_seed(1))
    output.x.backward(upstream)
    return [output.x, *output.layer_results], {name: p.grad for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_training_is_one_graph(case):
    modality, layout, options = CASES[case]
    encoder = encoder_of(modality, **options).train()
    x, options = arguments(layout)
    want, grads = run(encoder, encoder, x, options)
    got, compiled_grads = run(compiled(encoder), encoder, x, options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_is_one_graph():
    encoder = encoder_of("text", layers=2).eval()
    x, options = arguments("packed")
    with torch.no_grad():
        want = encoder(x, top_k=2, results_only=True, **options).layer_results
        got = compiled(encoder)(x, top_k=2, results_only=True, **options).layer_results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layerdrop_and_dropout_are_in_the_graph():
    """One graph draws other layers every time, and every parameter has a gradient at every step."""
    rates = {"layerdrop": 0.5, "dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.2}
    encoder = encoder_of("text", layers=2, checkpointing="full", **rates).train()
    x, call = torch.randn(1, T, 32), compiled(encoder)
    skipped = set()
    for _ in range(6):
        _, grads = run(call, encoder, x, {})
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        skipped |= {tuple(bool(grads[f"layers.{i}.fc1.weight"].any()) for i in range(2))}
    assert len(skipped) > 1
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0
