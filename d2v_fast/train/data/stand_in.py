"""A micro-batch in place of one of which nothing could be read: others wait for this rank's forward and backward."""

from dataclasses import replace

import numpy as np
import torch

from d2v_fast.nn import Batch, Data2VecConfig, make_batch


def stand_in(model: Data2VecConfig) -> Batch:
    """One small input, one position of it masked, that counts as none: ``num_masked`` is 0."""
    if model.modality == "image":
        inputs = torch.zeros(1, model.frontend.channels, model.frontend.image_size, model.frontend.image_size)
        positions = model.frontend.num_patches
    elif model.modality == "text":
        inputs = torch.zeros(1, min(16, model.frontend.max_positions), dtype=torch.int64)
        positions = inputs.shape[1]
    else:
        inputs = torch.zeros(1, model.frontend.min_samples + 15 * model.frontend.total_stride)
        positions = int(model.frontend.num_frames(inputs.shape[1]))
    return replace(make_batch(inputs, np.arange(positions)[None] == 0), real_masked=0)
