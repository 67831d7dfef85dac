"""What became of the experts' load, in the logs of any Trainer."""

import torch
from torch import distributed, nn
from transformers import TrainerCallback
from transformers.utils import logging

from mhmoe.evaluation.routing import RoutingRecorder
from mhmoe.modeling_mhmoe.load_balancing import padding_mask


logger = logging.get_logger(__name__)


class RoutingStatistics:
    """
    Counts, while it is entered, the experts that each training forward of `model` reaches. Padding does not count, and
    neither do forwards without gradients (evaluation, generation, a reference model) and what gradient checkpointing
    runs again.

    Args:
        model: as for [`RoutingRecorder`].
        model_types: the kinds of model that are counted, as for [`RoutingRecorder`].
    """

    def __init__(self, model: nn.Module, model_types: tuple[str, ...] | None = None):
        self._recorder = RoutingRecorder(model, model_types)
        self.layers = self._recorder.layers
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.forget()

    def forget(self) -> None:
        """Start again from zero."""
        self._counts = self._recorder.new_counts() if self.layers else None

    def __enter__(self) -> "RoutingStatistics":
        self._recorder.__enter__()
        if self._recorder.decoder is not None:
            self._hooks = [self._recorder.decoder.register_forward_hook(self._count, with_kwargs=True)]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._recorder.__exit__(*exception)

    def _count(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        # a layer's second forward, of gradient checkpointing, is not one of the decoder
        if self._counts is not None and decoder.training and torch.is_grad_enabled():
            attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            self._counts.add(self._recorder.chosen, padding_mask(attention_mask, tokens=output[0].shape[1]))

    def figures(self, device: torch.device) -> dict[str, float]:
        """
        Of all processes since the last time, or nothing where nothing was counted. Every process has to call it.

        Args:
            device: where the processes add up their counts.

        Returns:
            - `experts_activated`: the share of all layers' experts that some sub-token reached,
            - `max_over_mean_load`: the busiest expert's load over the mean load of its layer, 1 at the best,
            - `load_entropy`: the mean over layers of the loads' entropy, 1 for a uniform load and 0 where one expert
              has all. (TRL logs an `entropy` of its own, that of the next token.)
        """
        if self._counts is None:
            return {}
        counts = self._recorder.new_counts()
        counts.counts = self._counts.counts
        if distributed.is_available() and distributed.is_initialized():
            shared = self._counts.counts.to(device)
            distributed.all_reduce(shared)
            counts.counts = shared.cpu()
        self.forget()
        if not counts.counts.any():
            return {}
        return {
            "experts_activated": counts.share_activated.mean().item(),
            "max_over_mean_load": counts.max_over_mean_load.amax().item(),
            "load_entropy": counts.entropy.mean().item(),
        }


class RoutingCallback(TrainerCallback):
    """
    Adds to each training loss that a [`Trainer`] logs the figures of [`RoutingStatistics`], of all processes since the
    last time. For MH-MoE and each MoE of transformers whose experts run on its experts backends, under TRL's trainers
    and PEFT too.

    ```python
    >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[RoutingCallback()])
    ```

    They are in `trainer.state.log_history` and in what is printed. Trainer puts its reporters (`report_to`) before the
    callbacks that it is given, so to be reported too this one has to come first:
    `trainer.callback_handler.callbacks.insert(0, RoutingCallback())`.
    """

    def __init__(self):
        self._statistics: RoutingStatistics | None = None

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._stop()  # a training that broke off
        assert model is not None  # Trainer gives it
        statistics = RoutingStatistics(model)
        if statistics.layers:
            self._statistics = statistics.__enter__()
        else:
            logger.warning(
                f"RoutingCallback logs nothing: {type(model).__name__} has no layers with experts that run on "
                "transformers' experts backends."
            )

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs):
        if self._statistics is not None and logs is not None and "loss" in logs:
            figures = self._statistics.figures(args.device)
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _stop(self) -> None:
        if self._statistics is not None:
            self._statistics.__exit__(None, None, None)
            self._statistics = None
