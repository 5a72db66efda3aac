"""What fairseq's speech and text models share, restated in plain PyTorch: layer, teacher, Adam, the flat optimizer.

Own code from the description of what fairseq computes: the same operators in the same layouts and number, parameters
under its names, so that weights go back and forth. ``tests/test_bench_references.py`` holds loss, gradients, updates,
teacher and every operator against the installed library. Between operators there is less Python than in fairseq: tiny
models, where little else counts, need a tenth less of the processor.

What is compared. The published runs kept the model in float16, one flat float32 copy of all weights for Adam, and a
loss scaler. Here the model is in bfloat16, which needs no scaler and does not wait for the device to look for
overflows, in fairseq's favour; so is the flat copy, where its own ``common.bf16`` keeps one for each weight. Its
trainer has no autocast: a step under autocast with float32 parameters is timed beside. Attention is what fairseq's call
of PyTorch is today, its fused kernels; those of 2022 had all weights in memory. Left out are LayerDrop, and apex's
kernels, which fairseq takes where apex is installed.
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig
from d2v_fast.nn.config import EncoderConfig


def check_config(config: Data2VecConfig, **wanted: object) -> None:
    """Refuse what is not restated; ``wanted`` are fields of the encoder, besides what both models have in common."""
    wanted = {"norm": "post", "layer_result": "ffn", "layerdrop": 0.0, "activation_dropout": 0.0, **wanted}
    for name, value in wanted.items():
        found = getattr(config.encoder, name)
        if found != value:
            raise ValueError(f"encoder.{name} must be {value!r} to be restated as fairseq writes it, got {found!r}")


def init_weights(module: nn.Module) -> None:
    """BERT's: N(0, 0.02), biases 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


def gelu(x: Tensor) -> Tensor:
    """In float32, cast back: ``fairseq.modules.gelu``."""
    return F.gelu(x.float()).type_as(x)


class Attention(nn.Module):
    """``MultiheadAttention``: separate projections, and PyTorch's function that makes one of them again."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """x [T, B, C]; ``padding`` bool [B, T], True = not attended to."""
        q, k, v, out = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        y, _ = F.multi_head_attention_forward(
            x, x, x, self.dim, self.heads, torch.empty([0]), torch.cat((q.bias, k.bias, v.bias)), None, None, False,
            self.dropout, out.weight, out.bias, self.training, padding, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=q.weight, k_proj_weight=k.weight, v_proj_weight=v.weight,
        )  # fmt: skip
        return y


class Layer(nn.Module):
    """``TransformerSentenceEncoderLayer`` and ``TransformerEncoderLayer``, post-norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.dim, config.heads, config.attention_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(config.dim, config.ffn_dim), nn.Linear(config.ffn_dim, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, B, C] to the layer's output, and its FFN's before dropout and residual, of which targets are made."""
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, padding)))
        result = self.fc2(gelu(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout(result)), result


class Teacher:
    """``EMAModule``: float32 averages, tensor by tensor, loaded into a copy of the module in the student's dtype."""

    def __init__(self, student: nn.Module, skip: Iterable[str]) -> None:
        self.module = copy.deepcopy(student).requires_grad_(False).eval()
        # those of a float32 module are its own parameters
        self.averages = {name: x.float() for name, x in self.module.state_dict().items()}
        self.skip = frozenset(skip)  # names of the parameters that are copied

    @torch.no_grad()
    def step(self, student: nn.Module, decay: float) -> None:
        """Move towards ``student``."""
        rate, state = 1 - decay, {}
        for name, p in student.named_parameters():
            average = self.averages[name]
            if name in self.skip:
                average.copy_(p.to(average.dtype))
            else:
                average.mul_(1 - rate)
                average.add_(p.to(average.dtype), alpha=rate)
            state[name] = average
        state.update(student.named_buffers())
        self.module.load_state_dict(state, strict=False)


class Adam(torch.optim.Optimizer):
    """fairseq's, in Python, tensor by tensor: decoupled weight decay first, eps added before the bias correction."""

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = v.sqrt().add_(group["eps"])
                if decay:
                    p.add_(p, alpha=-decay * lr)
                p.addcdiv_(m, root, value=-lr * math.sqrt(1 - beta2**step) / (1 - beta1**step))


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """A norm for each tensor, the norm of those; gradients scaled to ``max_norm`` unless that is 0. fairseq's, without
    the library that does it in one launch."""
    grads = [p.grad for p in params if p.grad is not None]
    total = torch.norm(torch.stack([torch.norm(g, p=2, dtype=torch.float32) for g in grads]))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp_(max=1))
    return total


class FlatOptimizer:
    """``FP16Optimizer`` for bfloat16: gradients are copied into one flat float32 tensor, weights back out of another.

    Args:
        params: of the model.
        optimizer: makes Adam for a list of parameters; it gets the flat one.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.params = list(params)
        self.flat = nn.Parameter(torch.cat([p.detach().float().flatten() for p in self.params]))
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = optimizer([self.flat])

    @torch.no_grad()
    def step(self, weight: float, max_norm: float) -> Tensor:
        """Update from the gradients times ``weight``; their norm before clipping to ``max_norm`` (0 = none)."""
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, self.flat.grad.split(sizes), strict=True):
            part.copy_(p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten())
        norm = weight * torch.norm(self.flat.grad, p=2, dtype=torch.float32)
        if max_norm > 0:
            weight = weight * (max_norm / (norm + 1e-6)).clamp_(max=1)
        self.flat.grad.mul_(weight)
        self.optimizer.step()
        for p, part in zip(self.params, self.flat.detach().split(sizes), strict=True):
            p.copy_(part.view_as(p))
        return norm

    def zero_grad(self) -> None:
        """The model's gradients are forgotten, the flat one is set to 0."""
        for p in self.params:
            p.grad = None
        self.flat.grad.zero_()
