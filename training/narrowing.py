"""
Training that makes shared experts narrower. A model that was converted with all neurons of the dense FFN begins with
the dense model's logits, but costs more than it. Here it loses the neurons that matter least, a few at each step,
while the others and the routed experts learn their work.
"""

import torch
from torch import distributed, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from mhmoe.errors import UserError
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock

from .arguments import Narrowing


class NarrowingCallback(TrainerCallback):
    """
    Drops neurons of all shared experts until each has `width` left; then the tensors are cut. Of ff neurons, after a
    share t of the steps that dropping takes, width + (ff - width) (1 - t)^3 are left (arXiv 1710.01878, eq. 1): many
    go early, when the others have time to learn. Those go first whose RMS(activation) |down column| over the step's
    tokens is the smallest, as strategy `calibrated` ranks them. A dropped neuron's down column is zero and stays so.

    The output of a shared expert is the same before and after its tensors are cut. Checkpoints hold the whole ones; a
    run that is resumed from one finds the dropped neurons by their columns.

    Args:
        width: the `shared_expert_intermediate_size` in the end.
        share: of all steps, after which the last neuron is dropped; above 0, at most 1.
    """

    def __init__(self, width: int, share: float = 0.5):
        self.width, self.share = width, share
        self._experts: list[_Neurons] = []

    def on_train_begin(self, args, state, control, **kwargs):
        blocks = [module for module in kwargs["model"].modules() if isinstance(module, MHMoESparseMoeBlock)]
        self._experts = [_Neurons(block.shared_expert) for block in blocks if block.shared_expert is not None]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        steps = max(round(self.share * state.max_steps), 1)
        rest = max(1 - (state.global_step + 1) / steps, 0)  # Trainer counts the step after this
        for neurons in self._experts:
            neurons.drop_to(self.width + round((neurons.number - self.width) * rest**3))

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        for neurons in self._experts:
            neurons.drop_to(self.width)
            neurons.cut(self.width)
        kwargs["model"].config.shared_expert_intermediate_size = self.width


class _Neurons:
    """Those of one shared expert: which are left, and how large their activations are."""

    def __init__(self, expert: nn.Module):
        self._expert = expert
        self._down = expert.get_parameter("down_proj.weight")
        self.number = self._down.shape[1]
        self._dropped = self._down.eq(0).all(dim=0)
        self._squares = torch.zeros(self.number, device=self._down.device)
        self._hook = expert.get_submodule("down_proj").register_forward_pre_hook(self._see)

    def _see(self, down_proj: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if down_proj.training and torch.is_grad_enabled():
            self._squares += inputs[0].detach().flatten(0, -2).float().square().sum(dim=0)

    def drop_to(self, number: int) -> None:
        """Drop so many that `number` are left, and the work of the optimizer on those dropped before."""
        if (more := self.number - number - int(self._dropped.sum())) > 0:
            if distributed.is_initialized():
                distributed.all_reduce(self._squares)  # the same ones in every process
            weight = self._squares.sqrt() * self._down.norm(dim=0)
            self._dropped[weight.masked_fill(self._dropped, torch.inf).argsort(stable=True)[:more]] = True
        self._down[:, self._dropped] = 0
        self._squares.zero_()

    def cut(self, width: int) -> None:
        """Take the dropped neurons, of which some may be left so that there are `width`, out of all tensors."""
        self._hook.remove()
        kept = self._dropped.int().argsort(stable=True)[:width].sort().values
        for name, projection in self._expert.named_children():
            if not isinstance(projection, nn.Linear):
                continue
            dim = 1 if name == "down_proj" else 0
            projection.weight = nn.Parameter(projection.weight.index_select(dim, kept))
            projection.out_features, projection.in_features = projection.weight.shape
            if dim == 0 and projection.bias is not None:
                projection.bias = nn.Parameter(projection.bias[kept])


def narrowing(
    arguments: Narrowing, model: PreTrainedModel, training_args: TrainingArguments, sharded: bool
) -> list[TrainerCallback]:
    """
    What makes the shared experts as narrow as the arguments say; nothing if they say nothing.

    Args:
        sharded: whether processes share out the model.

    Raises:
        UserError: that cannot be done with this model or run.
    """
    width, share = arguments.shared_expert_intermediate_size, arguments.narrowing_share
    if width is None:
        return []
    named = f"shared_expert_intermediate_size={width}"
    present = getattr(model.config, "shared_expert_intermediate_size", None)
    if model.config.model_type != "mhmoe" or not present:
        raise UserError(f"{named}: the model has no shared expert to make narrower; leave it out")
    if not 0 < width < present:
        raise UserError(f"{named} must be at least 1 and below the model's, {present}")
    if not 0 < share <= 1:
        raise UserError(f"narrowing_share={share:g} must be above 0 and at most 1")
    if sharded or training_args.fsdp or training_args.deepspeed:
        raise UserError(f"{named}: each process needs whole tensors; train with one process, or with DDP")
    if training_args.load_best_model_at_end:
        raise UserError(f"{named}: load_best_model_at_end could bring back a wider model; leave one of them out")
    return [NarrowingCallback(width, share)]
