"""Knowledge distillation (arXiv 1503.02531): beside the text, a model learns from the logits of another one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mhmoe.errors import UserError
from mhmoe.loading import load_causal_lm
from mhmoe.sources import find_folder

from .arguments import Distillation
from .causal_loss import changed_loss, targets_of
from .divergence import divergence


class Teacher:
    """
    A causal language model whose logits another one learns. It is not trained, and not saved with the other.

    Args:
        model: with the vocabulary of the model that is trained; put into evaluation mode, without gradients.
        weight: of the divergence from the teacher in the loss, 0 to 1; the cross entropy has 1 - weight.
        temperature: both models' logits are divided by it.
    """

    def __init__(self, model: PreTrainedModel, weight: float = 0.5, temperature: float = 1.0):
        self.model = model.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    def share_with(self, student: nn.Module) -> None:
        """Take the student's tensors where they are frozen and have the same name and bits: no second copy is held."""
        frozen = {name: tensor for name, tensor in student.named_parameters() if not tensor.requires_grad}
        for name, tensor in self.model.named_parameters():
            other = frozen.get(name)
            if other is None or type(other) is not type(tensor) or other.dtype != tensor.dtype:
                continue
            if torch.equal(other, tensor.to(other.device)):
                tensor.data = other.data

    @contextmanager
    def teaching(self, student: nn.Module, inputs: dict[str, torch.Tensor]) -> Generator[None]:
        """
        Within it, the loss inside a causal language model, which is about to get `inputs`, is
        `(1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || student)`, the divergence as a mean
        over the tokens that the cross entropy counts (arXiv 1503.02531, section 2).

        Args:
            student: a causal language model, bare or inside PEFT's.
            inputs: `input_ids` and `labels` (B, T), `attention_mask` where there is one.
        """
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with torch.no_grad():
            logits = self.model(**asked, use_cache=False).logits
        with changed_loss(student, lambda cross_entropy: partial(self._loss, cross_entropy, logits)):
            yield

    def _loss(
        self,
        cross_entropy: Callable,
        teacher_logits: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Logits (B, T, V) of both, labels (B, T) -> scalar; shifted as transformers' own loss is."""
        _, counted, number = targets_of(labels, shift_labels, num_items_in_batch, logits.device)
        mean = divergence(logits, teacher_logits, counted, self.temperature) / number
        taught = self.weight * self.temperature**2 * mean
        if self.weight == 1:
            return taught
        targets = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
        return (1 - self.weight) * cross_entropy(logits, labels, vocab_size, **targets, **kwargs) + taught


def check_distillation(arguments: Distillation, deepspeed: object) -> None:
    """Raise a [`UserError`] for options that could not work, or would do nothing."""
    if arguments.teacher is None:
        return
    if not 0 < arguments.distillation_weight <= 1:
        raise UserError(f"distillation_weight={arguments.distillation_weight:g} must be above 0 and at most 1")
    if arguments.distillation_temperature <= 0:
        raise UserError(f"distillation_temperature={arguments.distillation_temperature:g} must be above 0")
    if deepspeed:
        raise UserError(f"teacher={arguments.teacher}: DeepSpeed would take the teacher apart; train with FSDP2")


def load_teacher(
    arguments: Distillation, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel
) -> Teacher | None:
    """
    The teacher that the arguments name, sharing what it can with the student; `None` if they name none.

    Raises:
        UserError: it cannot be loaded, or does not speak of the same tokens as `tokenizer`.
    """
    if arguments.teacher is None:
        return None
    folder, _ = find_folder(arguments.teacher)
    model, own_tokenizer, missing = load_causal_lm(folder, dtype=arguments.teacher_dtype)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors of the teacher are not there, {missing[0]} for one")
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"teacher={arguments.teacher}: its tokens are not those of the model; choose a teacher with its tokenizer"
        )
    rows, own_rows = (len(of.get_output_embeddings().weight) for of in (student, model))
    if rows != own_rows:
        raise UserError(
            f"teacher={arguments.teacher}: has {own_rows} logits for a token, the model {rows}; choose another teacher"
        )
    teacher = Teacher(model, arguments.distillation_weight, arguments.distillation_temperature)
    teacher.share_with(student)
    return teacher
