"""A whole speech-base training step (forward, backward, AdamW, teacher): fairseq's Data2VecAudioModel and ours.

python benchmarks/bench_train_step.py --smoke      # CPU: 2 clips of 5 s, float32; OMP_NUM_THREADS=2
python benchmarks/bench_train_step.py --batch 12 --seconds 20 --json out.json

Both sides run in one process on the same waveforms and masks, taking turns; the loss of both is printed, from equal
weights with dropout off, before anything is timed. Without ve-fairseq (requirements/peers.txt) only ours runs.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, interleaved, ratios, summary, write_json

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

OPTIM = OptimConfig(lr=5e-4)


def load_peer():
    """The tests' fairseq helper (tests/fairseq_peer.py), or None where ve-fairseq is not installed."""
    try:
        import fairseq  # noqa: F401
    except ImportError:
        return None
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import fairseq_peer

    return fairseq_peer


def speech_config(dropout: bool) -> Data2VecConfig:
    config = Data2VecConfig.speech(profile="fairseq")
    if not dropout:
        config = replace(config, encoder=replace(config.encoder, dropout=0.0, attention_dropout=0.0, layerdrop=0.0))
    # LayerDrop would make the two sides do different amounts of work in a round
    return replace(config, encoder=replace(config.encoder, layerdrop=0.0))


def fairseq_model(peer, dropout: bool):
    p = 0.1 if dropout else 0.0
    config = peer.audio.Data2VecAudioConfig(
        extractor_mode="layer_norm",
        conv_pos=95,
        pos_conv_depth=5,
        average_top_k_layers=8,
        instance_norm_target_layer=True,
        dropout=p,
        attention_dropout=p,
        encoder_layerdrop=0.0,
        ema_decay=0.999,
        ema_end_decay=0.9999,
        ema_anneal_end_step=30_000,
        max_update=400_000,
    )
    model = peer.audio.Data2VecAudioModel(config).to(DEVICE)
    model.set_num_updates(0)
    return model.train()


def our_step(config: Data2VecConfig, batch: Batch) -> Callable[[], None]:
    model = Data2Vec(config).to(DEVICE).train()
    optimizer = build_optimizer(model, OPTIM)
    autocast = DEVICE.type == "cuda"
    return lambda: train_step(model, [batch], optimizer, lr=OPTIM.lr, update=1, autocast=autocast)


def fairseq_step(peer, waves: torch.Tensor, mask: np.ndarray) -> Callable[[], None]:
    model = fairseq_model(peer, dropout=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay, fused=True
    )
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        model.set_num_updates(count)  # the teacher's step
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            out = model(waves, mask_indices=mask)
        loss = out["losses"]["regression"] / out["sample_size"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf, foreach=True)  # fairseq logs the norm as well
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_equal_losses(peer, batch: Batch, mask: np.ndarray) -> None:
    """Refuse to time two models that do not compute the same thing."""
    theirs = fairseq_model(peer, dropout=False)
    ours = Data2Vec(speech_config(dropout=False)).to(DEVICE).train()
    state = peer.speech_state(theirs, ours.config.encoder.layers)
    ours.load_state_dict({**state, **peer.teacher_state(ours, state)})
    with torch.no_grad():
        a = ours(batch).loss.item()
        b = theirs(batch.inputs, mask_indices=mask)["losses"]["regression"].item()
    print(f"loss on equal weights: d2v_fast {a:.6f}, fairseq {b:.6f}, relative difference {abs(a - b) / b:.1e}")
    if abs(a - b) > 1e-5 * b:
        sys.exit("the losses differ: nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2 clips of 5 s, few rounds")
    parser.add_argument("--batch", type=int, default=2, help="clips")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a clip")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.seconds, args.rounds = 2, 5.0, 5

    torch.manual_seed(0)
    config = speech_config(dropout=True)
    waves = torch.randn(args.batch, int(args.seconds * config.frontend.sample_rate), device=DEVICE)
    frames = config.frontend.num_frames(waves.shape[1])
    mask = config.mask.draw(np.random.default_rng(0), np.full(args.batch, frames), frames)
    batch = make_batch(waves, mask).to(DEVICE)

    providers = {"d2v_fast": our_step(config, batch)}
    peer = load_peer()
    if peer is None:
        print("fairseq: not installed")
    else:
        check_equal_losses(peer, batch, mask)
        providers["fairseq"] = fairseq_step(peer, waves, mask)
    times = interleaved(providers, args.rounds)
    results = ratios(times, "d2v_fast")

    print(f"speech base, {args.batch} x {args.seconds:g} s, {frames} frames, {DEVICE.type}")
    for name, r in results.items():
        absolute = ""
        if DEVICE.type == "cuda":  # a CPU's times say nothing beyond the machine, and are not kept
            r.update(summary(times[name]))
            absolute = f", median {1000 * r['median']:.1f} ms"
        print(f"{name:9} time / d2v_fast {r['ratio']:.3f} (p20 {r['p20']:.3f}, p80 {r['p80']:.3f}){absolute}")
    if args.json:
        record = {"benchmark": "train_step", "arguments": vars(args), "results": results}
        write_json(args.json, record, args.commit)


if __name__ == "__main__":
    main()
