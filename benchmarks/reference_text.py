"""``Data2VecTextModel`` of fairseq restated: the forward of a training step, teacher included.

See ``reference_fairseq.py`` for what is compared. The teacher reads the masked tokens alone, padding elsewhere, as
released. Dims: B rows, T tokens, C channels, N masked tokens.
"""

import fairseq_eager
import torch
from reference_fairseq import Layer, Teacher, check_config, init_weights
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig


class SentenceEncoder(nn.Module):
    """``TransformerEncoder``: token and learned position embeddings, layer norm, layers."""

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__()
        frontend, dim = config.frontend, config.encoder.dim
        self.padding = frontend.pad_index
        self.register_buffer("version", torch.tensor([3.0]))
        self.dropout = nn.Dropout(frontend.dropout)
        self.embed_tokens = nn.Embedding(frontend.vocab_size, dim, self.padding)
        self.embed_positions = nn.Embedding(frontend.max_positions + self.padding + 1, dim, self.padding)
        self.layernorm_embedding = nn.LayerNorm(dim, eps=config.encoder.norm_eps)
        self.layers = nn.ModuleList(Layer(config.encoder) for _ in range(config.encoder.layers))
        init_weights(self)

    def positions(self, tokens: Tensor) -> Tensor:
        """Ids [B, T]: counted without padding, from ``padding`` + 1 on."""
        real = tokens.ne(self.padding).int()
        return (torch.cumsum(real, dim=1).type_as(real) * real).long() + self.padding

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, T] to [T, B, C], and every layer's FFN output likewise."""
        padding = tokens.eq(self.padding)
        some = padding.any()
        x = 1.0 * self.embed_tokens(tokens)  # the embeddings' scale
        x = self.dropout(self.layernorm_embedding(x + self.embed_positions(self.positions(tokens))))
        x = x * (1 - padding[..., None].type_as(x) * some.type_as(x))
        x, results = x.transpose(0, 1), []
        for layer in self.layers:
            x, result = layer(x, padding if some else None)  # waits for the device at every layer
            results.append(result)
        tokens.ne(self.padding).sum(dim=1, dtype=torch.int32)  # lengths, which it returns and nobody reads
        return x, results


class TextReference(nn.Module):
    """The whole model; :meth:`loss` is a step's forward, :meth:`follow` the teacher's step."""

    def __init__(self, config: Data2VecConfig) -> None:
        super().__init__()
        check_config(config)
        targets = config.targets
        if (targets.norm, targets.post_norm, targets.teacher_input) != ("layer", "none", "masked"):
            raise ValueError("only the published recipe is restated: layer norm of targets, a teacher of masked tokens")
        self.config, dim = config, config.encoder.dim
        widths = [dim, *[2 * dim] * (config.head_layers - 1)]
        head = [part for a in widths[:-1] for part in (nn.Linear(a, 2 * dim), nn.GELU())]
        regression_head = nn.Sequential(*head, nn.Linear(widths[-1], dim))
        init_weights(regression_head)
        self.encoder = nn.ModuleDict({"sentence_encoder": SentenceEncoder(config), "regression_head": regression_head})
        self.make_teacher()

    def make_teacher(self) -> None:
        """A new one, equal to the student and in its precision."""
        student = self.encoder["sentence_encoder"]
        copied = [name for name, _ in student.named_parameters() if name.startswith(("embed_", "layernorm_embedding."))]
        self.teacher = Teacher(student, copied)

    def follow(self, update: int) -> None:
        """The teacher's step behind ``update`` updates."""
        self.teacher.step(self.encoder["sentence_encoder"], self.config.ema.decay_at(update))

    def loss(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask [B, T]: the loss summed over masked tokens.

        Both inputs of fairseq's model are made here, as its data loader makes them.
        """
        frontend, config = self.config.frontend, self.config
        inputs = tokens.masked_fill(mask, frontend.mask_index)
        kept = tokens.masked_fill(~mask, frontend.pad_index)
        x, _ = self.encoder["sentence_encoder"](inputs)
        with torch.no_grad():
            self.teacher.module.eval()
            _, results = self.teacher.module(kept)
        mask = inputs.eq(frontend.mask_index)
        results = [y.transpose(0, 1) for y in results[-config.targets.top_k :]]
        targets = fairseq_eager.layer_targets(results, mask, mask, norm="layer", post_norm="none")["targets"]
        pred = self.encoder["regression_head"](x.transpose(0, 1)[mask])
        scale = config.loss.scale_for(pred.shape[1])
        return fairseq_eager.masked_smooth_l1(pred, targets, None, beta=config.loss.beta, scale=scale)["loss"]
