"""Trainer, with the load balancing loss and what became of the experts' load in its logs."""

from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from mhmoe.evaluation.routing import RoutingRecorder

from .sharding import ShardedTrainer


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
    - `max_over_mean_load`: the busiest expert's load over the mean load of its layer, 1 at the best.

    After each optimizer step it updates the routers' biases, if the config has a `router_bias_update_rate`.
    Models of another kind are trained as by [`Trainer`].

    Args:
        balance: whether the losses of the routers, load balancing and z-loss, are part of the training loss.
        *args, **kwargs: those of [`Trainer`].
    """

    def __init__(self, *args, balance: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RouterBiasCallback)
        self.balance = balance
        self._recorder = RoutingRecorder(self.model)
        self._forget_routing()

    def train(self, *args, **kwargs):
        with self._recorder:
            return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        if not self._recorder.layers:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inputs = {**inputs, "output_router_logits": model.training and self.balance}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            # right after the forward: with gradient checkpointing, the backward pass runs the routers again
            self._counts.add(self._recorder.chosen, inputs.get("attention_mask"))
            if self.balance:
                self._aux_losses.append(outputs["aux_loss"].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._recorder.layers:
            logs = {**logs, **self._routing_logs()}
            self._forget_routing()
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """As in [`Trainer`], unless there is a card, which it would replace."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def _routing_logs(self) -> dict[str, float]:
        counts = self._recorder.new_counts()
        counts.counts = self.accelerator.reduce(self._counts.counts.to(self.args.device), "sum").cpu()
        figures = {
            "experts_activated": counts.share_activated.mean().item(),
            "max_over_mean_load": counts.max_over_mean_load.amax().item(),
        }
        if self.balance:
            aux_loss = self.accelerator.reduce(torch.stack(self._aux_losses).mean(), "mean")
            figures = {"aux_loss": aux_loss.item(), **figures}
        return figures

    def _forget_routing(self) -> None:
        self._counts = self._recorder.new_counts() if self._recorder.layers else None
        self._aux_losses: list[torch.Tensor] = []
