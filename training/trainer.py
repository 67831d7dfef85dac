"""Trainer, with the load balancing loss and what became of the experts' load in its logs."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from mhmoe.errors import SHOWN, UserError, one_line

from .label_smoothing import smoothed_labels
from .routing_callback import RoutingStatistics
from .sharding import ShardedTrainer
from .teacher import Teacher


class RouterBiasCallback(TrainerCallback):
    """
    Balances the experts by their routers' biases after each optimizer step, in a model whose config has a
    `router_bias_update_rate`. [`MHMoETrainer`] has it; a plain [`Trainer`] takes it among its `callbacks`.
    """

    def on_optimizer_step(self, args, state, control, model: nn.Module | None = None, **kwargs):
        if update := getattr(model, "update_router_biases", None):
            update()


class MHMoETrainer(ShardedTrainer):
    """
    [`Trainer`] that trains MH-MoE models with the load balancing loss, whatever their config's `output_router_logits`
    says, and evaluates them without it. Beside each training loss it logs, of all processes since the last time,
    - `aux_loss`: the load balancing loss before `router_aux_loss_coef`; k for a perfect balance, with `balance` alone,
    - `experts_activated`: the share of all layers' experts that some sub-token reached,
    - `max_over_mean_load`: the busiest expert's load over the mean load of its layer, 1 at the best,
    - `load_entropy`: the mean entropy of the layers' loads, 1 at the best.

    After each optimizer step it updates the routers' biases, if the config has a `router_bias_update_rate`.
    Models of another kind are trained as by [`Trainer`].

    Args:
        balance: whether the losses of the routers, load balancing and z-loss, are part of the training loss.
        teacher: a model to learn from beside the text; evaluations are of the text alone.
        *args, **kwargs: those of [`Trainer`].
    """

    def __init__(self, *args, balance: bool = True, teacher: Teacher | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RouterBiasCallback)
        self.balance = balance
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
        self._routing = RoutingStatistics(self.model, ("mhmoe",))
        self._aux_losses: list[torch.Tensor] = []
        if self._routing.layers:
            self.label_smoother = None  # which would replace the losses of the routers; compute_loss smooths

    def train(self, *args, **kwargs):
        self._forget_routing()
        with self._routing:
            return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, *args, **kwargs):
        with ExitStack() as losses:
            if self._routing.layers:
                inputs = {**inputs, "output_router_logits": model.training and self.balance}
                if factor := self.args.label_smoothing_factor:
                    losses.enter_context(smoothed_labels(self.accelerator.unwrap_model(model), factor))
            if self.teacher is not None and model.training:
                losses.enter_context(self.teacher.teaching(self.accelerator.unwrap_model(model), inputs))
            if not self._routing.layers:
                return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training and self.balance:
            self._aux_losses.append(outputs["aux_loss"].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._routing.layers:
            logs = {**logs, **self._routing_logs()}
        super().log(logs, start_time)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in [`Trainer`]; what is no state of random numbers is a [`UserError`]."""
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # of pickle, torch and numpy
            raise UserError(
                f"resume_from_checkpoint={checkpoint}: its rng_state cannot be used ({one_line(error, SHOWN)}); "
                "give an earlier checkpoint"
            ) from error

    def create_model_card(self, *args, **kwargs) -> None:
        """As in [`Trainer`], unless there is a card, which it would replace."""
        # ty: ignore[invalid-argument-type]: never None
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def _routing_logs(self) -> dict[str, float]:
        figures = self._routing.figures(self.args.device)
        if self.balance:
            aux_loss = self.accelerator.reduce(torch.stack(self._aux_losses).mean(), "mean")
            figures = {"aux_loss": aux_loss.item(), **figures}
        self._aux_losses.clear()
        return figures

    def _forget_routing(self) -> None:
        self._routing.forget()
        self._aux_losses.clear()
