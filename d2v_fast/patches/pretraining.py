"""data2vec pretraining of Transformers' encoders: what they lack for it, around the models themselves.

Dims: B batch, S samples, T positions (frames, tokens, patches).
"""

import logging
import weakref
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from d2v_fast.nn import Batch, Data2VecConfig, EMATeacher
from d2v_fast.ops._lists import is_plain
from d2v_fast.patches import _pretraining_network as network
from d2v_fast.patches._pretraining_data import INPUTS, Data2VecCollator, build_batch
from d2v_fast.patches._sharing import Slot

logger = logging.getLogger("d2v_fast.patches")
TEACHER = "teacher.module."
_models: "weakref.WeakSet[Data2VecPretraining]" = weakref.WeakSet()


class PretrainingOutput(dict):
    """``loss`` (mean over masked positions), ``target_var``, ``pred_var`` and ``num_masked``, all []."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Data2VecPretraining(nn.Module):
    """A transformers encoder as the student of a whole data2vec: masks, teacher, targets, loss (paper section 3).

    ``encoder`` is the model that was given; student and optimizer work on its own parameters, so that
    ``encoder.save_pretrained`` writes what was trained at any time. Computed is our model around them, with the ops and
    kernels of :class:`d2v_fast.Data2Vec`, and its results.

    The teacher moves after every step of the optimizer that has the encoder's first trained parameter (the model's,
    where the encoder is frozen), whoever calls it (``Trainer``, ``accelerate``, a loop); of several optimizers, step
    that one last. Optimizers that are not PyTorch's, or keep copies of the parameters, need :meth:`update_teacher`
    behind their step; a forward that finds the student changed and the teacher not, says so. ``state_dict`` has
    student, teacher and the number of updates.

    With gradient accumulation every micro-batch weighs the same. Several GPUs take a process each
    (``DistributedDataParallel``); neither sharded parameters (FSDP) nor ``DataParallel`` are supported, which
    ``Trainer`` uses where it sees several GPUs and was not started by torchrun: forward says so then.

    Args:
        hf_model: a ``Data2VecAudioModel``, ``Data2VecTextModel`` or ``Data2VecVisionModel`` (relative positions shared
            by all layers, or none), or a model that contains one.
        config: the recipe, instead of our preset; its network must be the model's.
        profile: "paper" or "fairseq": which one of the preset where they differ (docs/numerics.md).
        mask_token_id: of text; the last id by default.
        seed: of the masks that ``forward`` draws, from it, the update and the rank.
        **overrides: fields of the recipe: ``targets``, ``loss``, ``ema``, ``mask``, ``prune``, ``head_layers``. A
            dataclass of :mod:`d2v_fast.nn.config` or :mod:`d2v_fast.nn.masking` takes the place of the recipe's; a
            mapping, ``ema={"decay": 0.999}``, changes these fields of it.

    Raises:
        PatchError: no such model, or one with layers of others in it (adapters, quantised).
        CheckpointError: options of the model that we cannot follow; all are named.
        TypeError: an override that is unknown, of another type, or has unknown fields; ``config`` that is none.
        ValueError: a recipe that does not fit the model, or a value out of range.
    """

    accepts_loss_kwargs = False  # Trainer divides by the number of micro-batches
    main_input_name = "batch"

    def __init__(
        self,
        hf_model: nn.Module,
        *,
        config: Data2VecConfig | None = None,
        profile: str = "paper",
        mask_token_id: int | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        path, base = network.find_base(hf_model)
        super().__init__()
        self.recipe = network.read_recipe(base, config, profile, mask_token_id, overrides)
        self.encoder, self.seed = hf_model, seed
        self._base_path = f"encoder.{path}" if path else "encoder"
        for name, part in network.own_parts(self.recipe, base).items():
            setattr(self, name, part)
        rules = network.teacher_rules(self.recipe, base)
        self.teacher = EMATeacher(
            network.tracked_parts(self.recipe, base, getattr(self, "final_norm", None)),
            self.recipe.ema,
            network.skipped_names(self.recipe, rules),
            copies=torch.bfloat16 if self.recipe.prune.teacher_copy else None,
        )
        self._updates = 0  # optimizer steps
        self._forwards = {
            True: 0,
            False: 0,
        }  # in training since the last step, and in evaluation since the last of these
        self._seen: int | None = None  # version of the anchor at the last forward
        self._hooked_warning = False
        self._network: network.SharedNetwork | None = None
        self.register_state_dict_post_hook(_drop_shared)
        self.register_load_state_dict_pre_hook(_add_shared)
        self._ddp_params_and_buffers_to_ignore = self._unused()  # DistributedDataParallel waits for no gradient of them
        _follow_optimizers(self)
        self._student()

    @property
    def config(self) -> Any:
        """The configuration of the model in transformers; ours is ``recipe``."""
        return self.encoder.config

    @property
    def num_updates(self) -> int:
        """Optimizer steps that the teacher has followed."""
        return self._updates

    @property
    def base(self) -> nn.Module:
        """The data2vec encoder in ``encoder``."""
        return self.get_submodule(self._base_path)

    def _rules(self) -> list:
        return network.student_rules(self.recipe, self.base, f"{self._base_path}.")

    def _unused(self) -> list[str]:
        """Parameters of ``encoder`` that no loss depends on: poolers, heads of tasks."""
        used = {name for rule in self._rules() for name in rule.theirs}
        used.add(f"{self._base_path}.{network.TYPES}")
        return [name for name, _ in self.encoder.named_parameters("encoder") if name not in used]

    def _student(self) -> nn.Module:
        """Our model around the parameters; made anew where a copy or a change of settings left it out."""
        if self._network is None:
            averages = network.Averages(self.teacher, self.recipe, network.teacher_rules(self.recipe, self.base))
            with torch.device("meta"):
                ours = network.Network(self.recipe, averages)
            text = self.recipe.modality == "text"
            types = [Slot(self.base.embeddings.token_type_embeddings, "weight")] if text else []
            self._network = network.SharedNetwork(ours, self, self._rules(), types)
        return self._network.module

    def forward(
        self,
        input_values: Tensor | None = None,  # [B, S] float, normalised waveforms
        input_ids: Tensor | None = None,  # [B, T] integers, not masked
        pixel_values: Tensor | None = None,  # [B, C, H, W] float
        attention_mask: Tensor | None = None,  # [B, S] or [B, T], 1 = valid, 0 = padding at the end
        mask: Tensor | None = None,  # [B, T] bool, True = masked
        batch: Batch | None = None,
        return_loss: bool = True,  # always; Trainer looks for this argument before it evaluates
    ) -> PretrainingOutput:
        """Loss of the student against the current teacher.

        ``batch``, as :meth:`collator` makes it, brings everything; nothing waits for the device then. Otherwise masks
        are drawn here if none are given, and ``mask`` and ``attention_mask`` are read on the host. ``torch.compile``
        takes ``batch`` alone, and a teacher that is to move once a micro-batch moves once an update in it.

        Raises:
            TypeError: inputs or masks of a wrong dtype.
            ValueError: not exactly one of the inputs, that of another modality, shapes that do not fit, padding that
                is not at the end, or no masked position; a replica of ``DataParallel``.
        """
        if getattr(self, "_is_replica", False):  # ours in it has the parameters of the original
            raise ValueError(
                "Data2VecPretraining must run in one process a GPU, got a replica of DataParallel: start it with "
                "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._check_student()
        if batch is None:
            if compiling:
                raise ValueError("batch must be given where torch.compile traces, as collator() makes it")
            inputs = self._pick(input_values=input_values, input_ids=input_ids, pixel_values=pixel_values)
            batch = build_batch(self.recipe, inputs, attention_mask, mask, self._generator())
        elif any(x is not None for x in (input_values, input_ids, pixel_values, attention_mask, mask)):
            raise ValueError("batch must come alone: it has inputs and masks")
        elif not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch, as collator() makes it, got {type(batch).__name__}")
        elif batch.num_masked == 0:
            raise ValueError("batch must have a masked position, got none: there is nothing to predict")
        if not compiling:  # a number that changes would be traced anew
            self._count()
        out = self._student()(batch)
        num_masked = torch.full((), batch.num_masked, device=out.loss.device)
        loss = out.loss / batch.num_masked
        return PretrainingOutput(loss=loss, target_var=out.target_var, pred_var=out.pred_var, num_masked=num_masked)

    def _count(self) -> None:
        """Number this forward, and move the teacher where that happens once a micro-batch."""
        if self.training and self._forwards[True] > 0 and self.recipe.ema.per == "micro_batch":
            self.teacher.update_(self._updates, again=True)  # data2vec 1.0 as released; see docs/numerics.md
        self._forwards[self.training] += 1
        if self.training:
            self._forwards[False] = 0

    def _pick(self, **inputs: Tensor | None) -> Tensor:
        wanted = INPUTS[self.recipe.modality]
        given = [name for name, x in inputs.items() if x is not None]
        if given != [wanted]:
            raise ValueError(f"inputs of {self.recipe.modality} must be {wanted}, got {', '.join(given) or 'none'}")
        return inputs[wanted]

    def _generator(self) -> np.random.Generator:
        """For the masks of this forward: of the seed, the rank, and which of an update's, or evaluation's, it is.

        Every evaluation has the same masks, and training has those that it would have without.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        update = self._updates if self.training else 0
        return np.random.default_rng([self.seed, rank, self.training, update, self._forwards[self.training]])

    def update_teacher(self) -> float:
        """Move the teacher after an optimizer step; return the decay. Optimizers of PyTorch do so by themselves."""
        self._updates += 1
        self._forwards[True], self._seen = 0, None
        return self.teacher.update_(self._updates)

    def _anchor(self) -> nn.Parameter | None:
        parameters = chain(self.base.encoder.parameters(), self.parameters())
        return next((p for p in parameters if p.requires_grad), None)

    def _follow(self, optimizer: Optimizer) -> None:
        anchor = self._anchor()
        if any(p is anchor for group in optimizer.param_groups for p in group["params"]):
            self.update_teacher()

    def _check_student(self) -> None:
        """Say so if the student was changed and the teacher not; and if there are hooks that do not run."""
        anchor = self._anchor()
        if anchor is not None and not is_plain(anchor):
            raise ValueError(f"parameters must be whole on every rank, got {type(anchor).__name__}: shard no layer")
        version = None if anchor is None or anchor.is_inference() else anchor._version
        if self.training and None not in (version, self._seen) and version != self._seen:
            logger.warning("the student's weights changed, and no optimizer step was seen: call update_teacher()")
        self._seen = version
        if not self._hooked_warning and any(m._forward_hooks or m._forward_pre_hooks for m in self.base.modules()):
            self._hooked_warning = True
            logger.warning("forward hooks in %s do not run: its layers are computed by ours", type(self.base).__name__)

    def collator(self) -> Data2VecCollator:
        """For ``DataLoader`` and ``Trainer(data_collator=...)``: pads, and draws the masks in the loader's workers."""
        return Data2VecCollator(self.recipe)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Compute each layer again in backward, as ``Trainer(gradient_checkpointing=True)`` asks for."""
        self._set_checkpointing("full")

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._set_checkpointing("none")

    def _set_checkpointing(self, kind: str) -> None:
        self.recipe = replace(self.recipe, encoder=replace(self.recipe.encoder, checkpointing=kind))
        self._network = None

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Write the student as transformers does, for its ``from_pretrained``; options are those of its method."""
        self.encoder.save_pretrained(folder, **options)

    def get_extra_state(self) -> Tensor:
        """The number of updates, [] int64 (safetensors holds nothing but tensors)."""
        return torch.tensor(self._updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the number of updates."""
        self._updates, self._forwards[True], self._seen = int(state), 0, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None, "_seen": None}  # a copy's tensors count their versions anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow_optimizers(self)

    def _shared_names(self, prefix: str) -> dict[str, str]:
        """Names in ``state_dict`` of what may be another tensor under a second name, and its first name.

        The teacher's, which may be the student's, and tied weights.
        """
        names, first = {}, {}
        for name, parameter in self.encoder.named_parameters("encoder", remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                names[f"{prefix}{name}"] = f"{prefix}{first[id(parameter)]}"
        for name in self.teacher.module.state_dict(keep_vars=True):
            part, _, rest = name.partition(".")
            own = part == "norm" and hasattr(self, "final_norm")
            theirs = f"{self._base_path}.{ {'norm': 'layernorm'}.get(part, part) }"
            names[f"{prefix}{TEACHER}{name}"] = f"{prefix}{'final_norm' if own else theirs}.{rest}"
        return names


def _drop_shared(model: Data2VecPretraining, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Tensors of the same memory are saved once: safetensors refuses them."""
    for mine, theirs in model._shared_names(prefix).items():
        if mine in state and theirs in state and state[mine].data_ptr() == state[theirs].data_ptr():
            del state[mine]


def _add_shared(model: Data2VecPretraining, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """The opposite of :func:`_drop_shared`."""
    for mine, theirs in model._shared_names(prefix).items():
        if mine not in state and theirs in state:
            state[mine] = state[theirs]


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for model in list(_models):
        model._follow(optimizer)


def _follow_optimizers(model: Data2VecPretraining) -> None:
    """Move the teacher of ``model`` behind optimizer steps. One hook serves all models."""
    if not _follow_optimizers.hooked:
        register_optimizer_step_post_hook(_after_step)
        _follow_optimizers.hooked = True
    _models.add(model)


_follow_optimizers.hooked = False
