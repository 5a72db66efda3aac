"""fairseq's span masks, drawn by the same calls of NumPy's generators, and put in without waiting for the device.

Upstream takes a fresh generator for every row (``data_utils.compute_mask_indices``); so do we, in the same order, so
that whoever makes these generators repeatable has the same masks. What is saved is Python's work on every masked frame,
one read of the device a row, and the search for the mask on the device.

Dims: B batch, T frames, C channels, M masked frames.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.nn.masking import spread_spans
from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back, state_of
from d2v_fast.patches._fingerprint import fingerprint

CHANNELS = "mask_channel_prob above 0: channels are masked too"
DRAWN = frozenset({"d207a8dd7b63619e"})  # compute_mask_indices of 2022-12: a generator a row


def draw_spans(
    lengths: np.ndarray,  # [B] frames of each row that are not padding
    num_frames: int,
    *,
    prob: float,
    length: int,
    min_masks: int = 0,
    require_same_masks: bool = True,
    mask_dropout: float = 0.0,
    add_masks: bool = False,
    seeds: Sequence[int] | None = None,
) -> np.ndarray:
    """Bool mask [B, num_frames] of spans of ``length`` frames, True = masked (``compute_mask_indices``, static spans).

    Rows of the same count have as many masked as the one with the fewest, or with ``add_masks`` the most. ``seeds`` [B]
    are of the rows' generators; without them these are seeded by chance.

    Raises:
        ValueError: a row gets no span, or nothing of it is left unmasked; upstream refuses both as well.
    """
    starts = np.zeros((lengths.size, num_frames), bool)
    for row, frames in enumerate(lengths.tolist()):
        rng = np.random.default_rng(None if seeds is None else seeds[row])
        spans = max(min_masks, int(prob * frames / float(length) + rng.random()))
        if spans == 0:
            raise ValueError(f"mask_prob must give every row a span, got {prob} for a row of {frames} frames")
        tail = frames - spans - 1 if frames - length <= spans else length  # too few starts: upstream takes more
        chosen = rng.choice(frames - tail, spans, replace=False)
        starts[row, chosen[chosen < num_frames]] = True  # of a single frame, upstream draws one that is not there
    mask = spread_spans(starts, min(length, num_frames)) & (np.arange(num_frames) < lengths[:, None])
    counts = mask.sum(1)
    if (counts >= lengths).any():
        raise ValueError(f"masks must leave a frame of every row unmasked, got rows of {lengths.tolist()} frames")
    wanted = counts.max() if add_masks else counts.min()
    for row in range(lengths.size):  # the last row's generator goes on, as upstream
        if require_same_masks and counts[row] > wanted:
            kept = rng.choice(np.flatnonzero(mask[row]), wanted, replace=False)
            mask[row] = False
            mask[row, kept] = True
        elif require_same_masks and counts[row] < wanted:  # padding as well, as upstream
            mask[row, rng.choice(np.flatnonzero(~mask[row]), wanted - counts[row], replace=False)] = True
        if mask_dropout > 0:
            masked = np.flatnonzero(mask[row])
            holes = np.rint(len(masked) * mask_dropout).astype(int)
            mask[row, rng.choice(masked, holes, replace=False)] = False
    return mask


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """``x`` on ``device``, copied without waiting for it."""
    found = torch.from_numpy(x)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def _version(tensor: Tensor | np.ndarray | None) -> int | None:
    """A number that changes when a tensor is written to; None where nothing counts that."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


@torch.compiler.disable
def hand_on(owner: Any, what: str, tensor: Tensor | None, value: Any) -> None:
    """Keep with ``owner`` what is known of ``tensor``, for whoever gets this very tensor next."""
    state_of(owner).cache[what] = (tensor, _version(tensor), value)


@torch.compiler.disable
def handed_on(owner: Any, what: str, tensor: Tensor | np.ndarray) -> Any:
    """What was handed on with ``tensor``; None where that was another one, or it was written to since."""
    known, version, value = state_of(owner).cache.get(what, (None, None, None))
    return value if known is tensor and version is not None and version == _version(tensor) else None


@torch.compiler.disable
def on_host(owner: Any, what: str, tensor: Tensor | np.ndarray) -> np.ndarray:
    """``tensor`` on the host: what was handed on with it, or else a copy, for which a device is waited for."""
    value = handed_on(owner, what, tensor)
    if value is not None:
        return value
    return tensor if isinstance(tensor, np.ndarray) else tensor.cpu().numpy()


@torch.compiler.disable
def _drawn(
    owner: Any, x: Tensor, padding_mask: Tensor | None, upstreams: Callable, how: dict[str, Any], options: Options
) -> Tensor:
    """A mask [B, T] on the device of x; on the host it is handed on."""
    shape = tuple(x.shape[:2])
    reason = _drawn_upstream(owner, upstreams)
    if reason is None:
        lengths = frame_lengths(owner, padding_mask, shape)
        mask = draw_spans(lengths, shape[1], prob=owner.mask_prob, length=owner.mask_length, **how)
    else:
        fall_back(owner, "apply_mask", reason, options, whole=False)
        spans = (owner.mask_prob, owner.mask_length, owner.mask_selection, owner.mask_other)
        how = {**how, "no_overlap": owner.no_mask_overlap, "min_space": owner.mask_min_space}
        mask = upstreams(shape, padding_mask, *spans, **how)
    found = to_device(mask, x.device)
    hand_on(owner, "mask", found, mask)
    return found


def frame_lengths(owner: Any, padding_mask: Tensor | None, shape: tuple[int, int]) -> np.ndarray:
    """Frames [B] of every row of a batch [B, T] that ``padding_mask`` leaves."""
    if padding_mask is None:
        return np.full(shape[0], shape[1])
    if padding_mask.dtype != torch.bool:
        padding_mask = padding_mask.long()  # as upstream counts them
    return shape[1] - on_host(owner, "padding", padding_mask).sum(1)


def _drawn_upstream(owner: Any, upstreams: Callable) -> str | None:
    """Why masks are drawn by upstream's function, or None."""
    cache = state_of(owner).cache
    if cache.get("draws", (None,))[0] is not upstreams:
        cache["draws"] = (upstreams, fingerprint(upstreams) in DRAWN)
    if not cache["draws"][1]:
        return "masks are drawn by a compute_mask_indices that ours was not written from"
    if owner.mask_selection != "static" or owner.no_mask_overlap:
        return "masks are drawn by upstream: spans of different lengths, or without overlaps"
    return None


def _make_apply_mask(original: Callable, options: Options, *, min_masks: int) -> Callable:
    names = original_globals(original)

    def apply_mask(self, x, padding_mask, mask_indices=None, mask_channel_indices=None):
        """Put the mask embedding into a copy of x [B, T, C]; (x, bool mask [B, T])."""
        if self.mask_channel_prob > 0:
            fall_back(self, "apply_mask", CHANNELS, options)
            return original(self, x, padding_mask, mask_indices, mask_channel_indices)
        if self.mask_prob <= 0:
            return x, None
        if mask_indices is None:
            how = {"min_masks": min_masks, "require_same_masks": self.cfg.require_same_masks}
            how["mask_dropout"] = self.cfg.mask_dropout
            mask_indices = _drawn(self, x, padding_mask, names["compute_mask_indices"], how, options)
        mask = mask_indices if isinstance(mask_indices, Tensor) else _given(self, x, mask_indices)
        return torch.where(mask.to(x.device, torch.bool)[..., None], self.mask_emb.to(x.dtype), x), mask_indices

    return apply_mask


def _make_huberts(original: Callable, options: Options) -> Callable:
    names = original_globals(original)

    def apply_mask(self, x, padding_mask, target_list):
        """Put the mask embedding into x [B, T, C] itself, as upstream does; (x, bool mask [B, T])."""
        if self.mask_channel_prob > 0:
            fall_back(self, "apply_mask", CHANNELS, options)
            return original(self, x, padding_mask, target_list)
        if self.mask_prob <= 0:
            return x, None
        mask = _drawn(self, x, padding_mask, names["compute_mask_indices"], {"min_masks": 2}, options)
        x[mask] = self.mask_emb
        return x, mask

    return apply_mask


@torch.compiler.disable
def _given(owner: Any, x: Tensor, mask: np.ndarray) -> Tensor:
    return to_device(mask, x.device)


def original_globals(original: Callable) -> dict[str, Any]:
    """The names that upstream's function sees."""
    return inspect.unwrap(original).__globals__


DRAWS = "spans drawn by the same random numbers without a loop over frames"
APPLY_MASK = Seam(
    "masks",
    "apply_mask",
    partial(_make_apply_mask, min_masks=1),
    f"{DRAWS}, put in without waiting for the device",
    frozenset({"018026be7cc8a8c4"}),
)
WAV2VEC2 = replace(APPLY_MASK, make=partial(_make_apply_mask, min_masks=2), known=frozenset({"af48a54644e0b27c"}))
HUBERT = replace(APPLY_MASK, make=_make_huberts, does=DRAWS, known=frozenset({"d20092f5076d7d24"}))
SEAMS = {"Wav2Vec2Model": WAV2VEC2, "HubertModel": HUBERT}  # data2vec's belongs to its other seams


def seams(kind: type) -> list[Seam]:
    """The masks of wav2vec 2.0 and HuBERT, at their classes."""
    return [seam for name, seam in SEAMS.items() if name in {k.__name__ for k in kind.__mro__}]


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """The masks of every such model in ``model``."""
    return [Site(path, part, seam) for path, part in model.named_modules() for seam in seams(type(part))]
