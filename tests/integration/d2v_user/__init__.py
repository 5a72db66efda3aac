"""A fairseq ``user_dir``: data2vec 1.0 and 2.0 on a current Python, the same masks in every run, a record.

The released folder imports torchvision and timm for its image tasks. The record, a file named by D2V_RECORD, gets what
fairseq logs, not rounded, a line a value, and at the end what was replaced and how often it was called.
"""

import atexit
import functools
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack

import fairseq
import numpy as np
import torch
from fairseq.logging import metrics
from fairseq.models.transformer.transformer_config import TransformerConfig

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))  # the tests

import timm_parts
from fairseq_multi_source import import_data2vec2

LOGGED = ("loss", "gnorm", "target_var", "pred_var")


def import_models() -> None:
    sys.path.insert(0, os.path.dirname(fairseq.__file__))
    TransformerConfig.__hash__ = object.__hash__  # Python 3.11 refuses unhashable dataclass defaults
    from examples.data2vec.models import data2vec_audio, data2vec_text  # noqa: F401

    import_data2vec2()
    # upstream asks for this when it loads a checkpoint, under a name that the teacher no longer has
    data2vec_text.Data2VecTextEncoder.target_model = None


def draw_masks_by_update() -> None:
    """Generators without a seed, which draw the masks of speech, become a function of the update and its calls."""
    made, calls = np.random.default_rng, Counter()

    def default_rng(seed=None):
        if seed is None:
            update = torch.initial_seed()  # fairseq sets it at the start of each
            calls[update] += 1
            seed = (update, calls[update])
        return made(seed)

    np.random.default_rng = default_rng


def record_values(file) -> None:
    log_scalar = metrics.log_scalar

    def log_and_record(key, value, *args, **kwargs):
        if key in LOGGED:
            print(json.dumps({"key": key, "value": float(value)}), file=file, flush=True)
        return log_scalar(key, value, *args, **kwargs)

    metrics.log_scalar = log_and_record


def count_calls() -> Counter:
    """Of everything that was replaced in a class."""
    calls = Counter()

    def counted(name, method):
        @functools.wraps(method)
        def count(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        return count

    handle = sys.modules["d2v_fast.auto"].handle
    for patch in handle.patches:
        for site in patch.applied:
            calls[site.name] = 0
            attribute = site.seam.attribute
            setattr(site.owner, attribute, counted(site.name, vars(site.owner)[attribute]))
    return calls


def finish(file, calls: Counter) -> None:
    handle = sys.modules["d2v_fast.auto"].handle
    fallbacks = [[*key, count] for patch in handle.patches for key, count in patch.fallbacks().items()]
    left = [[s.name, s.part, s.reason] for patch in handle.patches for s in patch.skipped if not s.harmless]
    print(json.dumps({"calls": calls, "fallbacks": fallbacks, "left": left}), file=file, flush=True)


import_models()
whole_run = ExitStack()
whole_run.enter_context(timm_parts.installed())  # blocks of data2vec 2.0 import parts of timm when they are made
draw_masks_by_update()
record = open(os.environ["D2V_RECORD"], "w")  # noqa: SIM115 (to the end of the process)
record_values(record)
if "d2v_fast.auto" in sys.modules:
    atexit.register(finish, record, count_calls())
