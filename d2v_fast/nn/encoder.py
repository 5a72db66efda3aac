"""One Transformer for speech, images and text.

Dims: B batch, T positions (frames, patches with the class token, tokens), N packed rows, U sequences, M selected rows,
C channels, H heads.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.nn.block import Block, Stream
from d2v_fast.nn.checkpointing import capturing, checkpointed
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.positions import ConvPositions, RelativePositionBias
from d2v_fast.nn.self_attention import Scope
from d2v_fast.nn.sequences import Sequences
from d2v_fast.ops._dropout import dropout


class EncoderOutput(NamedTuple):
    """What :class:`TransformerEncoder` returns; all in rows like its input, or [M, C] where rows were selected."""

    x: Tensor | None  # after the final norm in pre-norm encoders; None where only results were asked for
    layer_results: list[Tensor]  # of the last ``top_k`` layers, those of them that were executed
    hidden_states: list[Tensor]  # input of the first layer and output of every executed layer, if asked for


class TransformerEncoder(nn.Module):
    """Positions, layers and norms between front-end and head (fairseq ``TransformerEncoder``, BEiT blocks).

    ``grid`` is the number of patches along an image's side; only a relative-position bias needs it. With a
    ``layerdrop_seed`` LayerDrop draws from that on the CPU, instead of PyTorch's generator: the same layers on all
    ranks that use the same seed, whatever else they draw.
    """

    layerdrop_seed: int | None = None

    def __init__(self, config: EncoderConfig, grid: int = 0) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = ConvPositions(config) if config.pos_conv_depth else None
        self.relative_bias = RelativePositionBias(config.heads, grid) if config.relative_bias else None
        # speech normalises after adding positions, pre-norm encoders at the end; text has its norm in the embedding
        has_norm = config.norm == "pre" or config.pos_conv_depth > 0
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if has_norm else None
        last = max(1, config.layers - 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers: N(0, init_std) ("bert"), or truncated at one sigma and depth-scaled ("beit")."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.config)
        if self.config.init == "beit":
            for depth, layer in enumerate(self.layers, start=1):
                layer.attention.out.weight.data.div_((2 * depth) ** 0.5)
                layer.fc2.weight.data.div_((2 * depth) ** 0.5)

    def forward(
        self,
        x: Tensor,  # [B, T, C]; packed [N, C]
        *,
        sequences: Sequences | None = None,
        padding_mask: Tensor | None = None,  # [B, T] bool, True = padding
        top_k: int = 0,
        hidden_states: bool = False,
        select: Sequences | None = None,
        results_only: bool = False,
        kept: Sequence[int] | None = None,
    ) -> EncoderOutput:
        """Run the encoder.

        Args:
            x: a batch, or with ``sequences`` the rows of all sequences behind each other.
            sequences: where each sequence of packed rows begins; every one is computed as if it were alone.
            padding_mask: positions of a batch that are nobody's keys. In ``padding_aware`` encoders convolutions do not
                see them either; they are at the ends of a row then.
            top_k: keep the results of the last layers (what targets are built from); no other result stays alive.
            hidden_states: keep the input of the first layer and the output of every layer.
            select: the rows of the flattened x, all different, that are wanted in the end, with a sequence of them for
                each row of the batch or sequence of x. The last layer that is executed computes keys and values for
                all rows, and everything else for these alone.
            results_only: end with the last layer's result; ``x`` is None.
            kept: indices, rising, of the layers to run, if the caller has drawn for LayerDrop. Nothing is drawn here
                then, and the parameters of the other layers get no gradient, instead of one of 0.

        LayerDrop draws on the CPU, and layers that it skips have gradients of 0. Inside of ``torch.compile`` and of a
        CUDA graph it draws on the device: every layer is computed, and has a result, but a skipped one changes nothing.

        Raises:
            ValueError: a shape does not fit, two arguments exclude each other or, on the CPU, a selected row is in
                another sequence than ``select`` says.
        """
        wanted = _Wanted(len(self.layers) - top_k, hidden_states, select, results_only)
        self._check(x, sequences, padding_mask, wanted)
        self._check_kept(kept)
        x = self._positions(x, sequences, padding_mask)
        scope = Scope(sequences, padding_mask, None if self.relative_bias is None else self.relative_bias())
        results, states = [], [x] if hidden_states else []
        if kept is not None:
            stream = self._run(kept, x, scope, wanted, results, states)
        else:
            run = self._run_all if self._draws_on_device(x) else self._run_kept
            stream = run(x, scope, wanted, results, states)
        return EncoderOutput(None if results_only else stream.y, results, states)

    def _run_kept(self, x: Tensor, scope: Scope, wanted: "_Wanted", results: list, states: list) -> Stream | None:
        """Run the layers that LayerDrop leaves, and give the others gradients of 0."""
        kept = self._kept_layers()
        stream = self._run(kept, x, scope, wanted, results, states)
        if stream is not None and len(kept) < len(self.layers) and torch.is_grad_enabled():
            skipped = [p for i, layer in enumerate(self.layers) if i not in kept for p in layer.parameters()]
            if not kept and self.relative_bias is not None:  # what layers share
                skipped += self.relative_bias.parameters()
            stream = stream._replace(y=_ZeroGradients.apply(stream.y, *skipped))
        return stream

    def _run(
        self, kept: Sequence[int], x: Tensor, scope: Scope, wanted: "_Wanted", results: list, states: list
    ) -> Stream | None:
        """Run these layers."""
        norms = self._norms(kept)
        stream = self._first(x, norms[0])
        for index, next_norm in zip(kept, norms[1:], strict=True):
            stream, result = self._layer(index, stream, next_norm, scope, *wanted.of_layer(index == kept[-1]))
            wanted.hand_out(results, states, index, stream, result)
            del result  # nothing holds it while the next layer runs, unless it was handed out
        if not kept:
            stream = Stream(wanted.rows_of(stream.y), wanted.rows_of(stream.h))
        return stream

    def _run_all(self, x: Tensor, scope: Scope, wanted: "_Wanted", results: list, states: list) -> Stream | None:
        """The same with a draw on the device: all layers run, and those that LayerDrop skips change nothing."""
        count = len(self.layers)
        keep = torch.rand(count, device=x.device) > self.config.layerdrop
        norms = self._norms(range(count))
        stream = self._first(x, norms[0])
        for index, next_norm in enumerate(norms[1:]):
            last, before = index == count - 1, stream
            stream, result = self._layer(index, before, next_norm, scope, *wanted.of_layer(last))
            if stream is not None:
                h = wanted.rows_of(before.h) if last else before.h
                y = h if self.config.norm == "post" or next_norm is None else next_norm(h)
                pairs = ((stream.y, y), (stream.h, h))
                stream = Stream(*(torch.where(keep[index], new, old.to(new.dtype)) for new, old in pairs))
            wanted.hand_out(results, states, index, stream, result)
        return stream

    def _first(self, x: Tensor, norm: nn.LayerNorm | None) -> Stream:
        if self.config.norm == "post":
            return Stream(x, x)
        # LayerScale makes increments of 1e-4: the stream stays in the weights' precision under autocast
        h = x.to(torch.promote_types(x.dtype, self.norm.weight.dtype))
        return Stream(h if norm is None else norm(h), h)

    def _norms(self, kept: Sequence[int]) -> list[nn.LayerNorm | None]:
        """The norm in front of each layer, and the final one: pre-norm layers end with that of their successor.

        None where layers that stand alone apply it themselves.
        """
        first = [None if self.layers[index].alone else self.layers[index].norm1 for index in kept]
        return [*first, self.norm]

    def separate_layers(self) -> None:
        """Let no layer read another one's parameters from now on, so that each can be sharded on its own (FSDP2).

        Results are the same up to rounding. It costs a pass over memory for each layer of a pre-norm encoder, and with
        selective checkpointing the memory of a layer's input.
        """
        for layer in self.layers:
            layer.alone = True

    def _layer(self, index: int, stream: Stream, *options) -> tuple[Stream | None, Tensor]:
        layer = self.layers[index]
        if self.config.checkpointing != "full" or not torch.is_grad_enabled():
            return layer(stream, *options)
        return checkpointed(lambda y, h: layer(Stream(y, h), *options), stream.y, stream.h, random=layer.random)

    def _draws_on_device(self, x: Tensor) -> bool:
        return self.training and self.config.layerdrop > 0 and (torch.compiler.is_compiling() or capturing(x))

    def _kept_layers(self) -> list[int]:
        """Indices of the layers to run: all of them, less those that LayerDrop skips while training."""
        count = len(self.layers)
        if not self.training or self.config.layerdrop == 0:
            return list(range(count))
        seed = self.layerdrop_seed
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        keep = torch.rand(count, generator=generator) > self.config.layerdrop  # on the CPU: the host needs the answer
        return [i for i in range(count) if keep[i]]

    def _positions(self, x: Tensor, sequences: Sequences | None, padding_mask: Tensor | None) -> Tensor:
        """What the first layer reads: x without padding, with convolutional positions, norm and dropout."""
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[..., None], 0.0)
        if self.pos_conv is not None:
            x = x + self._convolved(x, sequences, padding_mask)
        if self.norm is not None and self.config.norm == "post":
            x = self.norm(x)
        return x if self.pos_conv is None or not self.training else dropout(x, self.config.dropout)

    def _convolved(self, x: Tensor, sequences: Sequences | None, padding_mask: Tensor | None) -> Tensor:
        if sequences is not None:
            cu_seqlens = sequences.cu_seqlens
            return self.pos_conv(x[None], torch.stack([cu_seqlens[:-1], cu_seqlens.diff()], 1))[0]
        if padding_mask is None or not self.config.padding_aware:
            return self.pos_conv(x)
        B, T = padding_mask.shape
        position = torch.arange(T, device=x.device)
        first = torch.where(padding_mask, T, position).amin(1)  # [B]
        count = (torch.where(padding_mask, -1, position).amax(1) + 1 - first).clamp(min=0)
        row = torch.arange(0, B * T, T, device=x.device)
        return self.pos_conv(x, torch.stack([row + first, count], 1))

    def _check_kept(self, kept: Sequence[int] | None) -> None:
        if kept is None:
            return
        bounds = (-1, *kept, len(self.layers))
        if not all(before < after for before, after in pairwise(bounds)):
            raise ValueError(f"kept must be rising indices of the {len(self.layers)} layers, got {list(kept)}")

    def _check(self, x: Tensor, sequences: Sequences | None, padding_mask: Tensor | None, wanted: "_Wanted") -> None:
        """Raise ValueError where arguments do not fit or exclude each other."""
        shape, C = tuple(x.shape), self.config.dim
        if sequences is None:
            if x.dim() != 3 or shape[2] != C:
                raise ValueError(f"x must be [B, T, {C}] without sequences, got {shape}")
            if padding_mask is not None and tuple(padding_mask.shape) != shape[:2]:
                raise ValueError(f"padding_mask must be {shape[:2]} like x, got {tuple(padding_mask.shape)}")
        else:
            if shape != (sequences.num_rows, C):
                raise ValueError(f"x must be {(sequences.num_rows, C)} with these sequences, got {shape}")
            if padding_mask is not None:
                raise ValueError("padding_mask must be None with sequences: packed rows have no padding")
            if self.relative_bias is not None:
                raise ValueError("sequences must be None: a relative-position bias belongs to whole images")
        count = shape[0] if sequences is None else sequences.count
        if wanted.select is not None and (wanted.select.rows is None or wanted.select.count != count):
            raise ValueError(f"select must have rows, {count} sequences of them like x, got {wanted.select.count}")
        if wanted.select is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_rows(wanted.select, sequences or Sequences.even(*shape[:2]))
        if wanted.results_only and (wanted.from_layer >= len(self.layers) or wanted.hidden_states):
            raise ValueError("results_only must come with a top_k of at least 1 and without hidden_states")


class _Wanted(NamedTuple):
    """What the caller of an encoder asked for."""

    from_layer: int  # results of this layer and later ones
    hidden_states: bool
    select: Sequences | None
    results_only: bool

    def of_layer(self, last: bool) -> tuple[Sequences | None, bool]:
        """``select`` and ``result_only`` of a layer: what is not wanted is left out of the last one."""
        return (self.select, self.results_only) if last else (None, False)

    def hand_out(self, results: list, states: list, index: int, stream: Stream | None, result: Tensor) -> None:
        """Append what a layer made to the lists, where it was asked for."""
        if index >= self.from_layer:
            results.append(result)
        if self.hidden_states:
            states.append(stream.h)

    def rows_of(self, x: Tensor) -> Tensor:
        """The selected rows [M, C] of x; all of x where none were selected."""
        return x if self.select is None else self.select.take(x.flatten(0, -2))


def _check_rows(select: Sequences, sequences: Sequences) -> None:
    """Raise ValueError unless every selected row that is real lies in the sequence that it is for."""
    rows = select.rows
    position = torch.arange(select.num_rows, dtype=torch.int32)
    which = torch.searchsorted(select.cu_seqlens[1:], position, right=True)
    first, last = (ends[which] for ends in (sequences.cu_seqlens[:-1], sequences.cu_seqlens[1:]))
    wrong = (rows < first) | (rows >= last)
    wrong = wrong if select.real is None else wrong & select.real
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"select must have rows of x's own sequences, got {int(rows[row])} for {int(which[row])}")


class _ZeroGradients(torch.autograd.Function):
    """x; in backward, zeros for parameters that had no part in it, so that the same ones have gradients every time."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        wanted = zip(ctx.parameters, ctx.needs_input_grad[1:], strict=True)
        return grad, *(torch.zeros_like(p) if needed else None for p, needed in wanted)


def init_linear(module: nn.Linear, config: EncoderConfig) -> None:
    """Initialise one linear layer; see :meth:`TransformerEncoder.reset_parameters`."""
    std = config.init_std
    if config.init == "beit":
        nn.init.trunc_normal_(module.weight, std=std, a=-std, b=std)
    else:
        nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
