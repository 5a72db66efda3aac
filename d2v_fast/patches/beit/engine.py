"""Targets and loss of data2vec for images, to be called in an existing training loop (paper section 3.3)."""

from collections.abc import Sequence

from torch import Tensor

from d2v_fast.ops import layer_targets, masked_smooth_l1
from d2v_fast.ops._lists import tensor_list


def beit_targets(
    layer_results: Sequence[Tensor] | Tensor,  # of all layers, [B, P, C] without the class token, or [L, B, P, C]
    mask: Tensor | None = None,  # [B, P] or [B, h, w] bool or integers, nonzero = masked
    *,
    target_layers: Sequence[int] | None = None,
    norm: str = "layer",
    post_norm: str = "layer",
) -> Tensor:
    """Average of normalised teacher outputs: float32 [M, C] at the masked patches, [B, P, C] without a mask.

    Args:
        layer_results: what the teacher gave, the same shape from every layer; or a tensor of L layers, stacked.
        mask: finding its M patches waits for the device, as indexing by it does.
        target_layers: which of them, counted from 0; by default all.
        norm: of each layer, over channels ("layer"), or "instance", "batch", "none".
        post_norm: of the average, "layer", "instance" or "none".

    Raises:
        ValueError: shapes that do not fit, no such layer, or an unknown norm.
        TypeError: something that is no tensor.
    """
    if isinstance(layer_results, Tensor):
        if layer_results.ndim != 4:
            raise ValueError(f"layer_results must be [L, B, P, C] if stacked, got {tuple(layer_results.shape)}")
        layer_results = layer_results.unbind()
    results = tensor_list("layer_results", layer_results)
    if target_layers is not None:
        wrong = [index for index in target_layers if not -len(results) <= index < len(results)]
        if wrong or not target_layers:
            raise ValueError(f"target_layers must be of {len(results)} layers, got {list(target_layers)}")
        results = [results[index] for index in target_layers]
    positions = None
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        _check_patches(mask, results)
        positions = mask.flatten().nonzero()[:, 0]
    return layer_targets(results, norm=norm, post_norm=post_norm, positions=positions)


def _check_patches(mask: Tensor, results: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``mask`` [B, ...] is of the patches of ``results``, [B, P, C] each."""
    if not results or results[0].ndim != 3:
        found = tuple(results[0].shape) if results else "none"
        raise ValueError(f"layer_results must be [B, P, C] of every layer, got {found}")
    B, P = results[0].shape[:2]
    masked = (mask.shape[:1].numel(), mask.shape[1:].numel()) if mask.ndim > 1 else None
    if masked == (B, P - 1):
        raise ValueError(
            f"layer_results must be [{B}, {P - 1}, C] as mask is of {P - 1} patches, got {P} positions: "
            "drop the class token, x[:, 1:]"
        )
    if masked != (B, P):
        raise ValueError(f"mask must be {(B, P)} patches, got {tuple(mask.shape)}")


def beit_loss(
    prediction: Tensor,  # [M, C]
    target: Tensor,  # [M, C]
    *,
    beta: float = 2.0,
    scale: float | None = None,
) -> Tensor:
    """Smooth L1 (squared error for ``beta=0``), the mean over patches and channels, times ``scale``: [] float32.

    Raises as :func:`d2v_fast.masked_smooth_l1`.
    """
    return masked_smooth_l1(prediction, target, beta=beta, scale=scale, reduction="mean")
