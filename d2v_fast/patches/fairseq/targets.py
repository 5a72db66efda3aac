"""fairseq's options for targets, as ours."""

from typing import Any

# ours -> fairseq's, in the order in which upstream applies them
OF_LAYERS = {
    "batch": "batch_norm_target_layer",
    "instance": "instance_norm_target_layer",
    "group": "group_norm_target_layer",
    "layer": "layer_norm_target_layer",
}
OF_AVERAGE = {"layer": "layer_norm_targets", "instance": "instance_norm_targets"}


def target_norms(cfg: Any) -> tuple[tuple[str, str], str | None]:
    """((norm, post_norm) of :func:`d2v_fast.ops.data2vec_loss`, None), or why that op has no such targets."""
    chosen = []
    for options in (OF_LAYERS, OF_AVERAGE):
        on = [name for name, option in options.items() if getattr(cfg, option, False)]
        if len(on) > 1:
            return ("none", "none"), "targets are normalised by " + " and ".join(options[name] for name in on)
        chosen.append(on[0] if on else "none")
    norm, post_norm = chosen
    return (norm, post_norm), "targets are normalised by group_norm_target_layer" if norm == "group" else None
