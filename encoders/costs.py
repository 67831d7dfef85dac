"""Parameters and multiply-adds of an encoder with MH-MoE layers, or of the dense one, from its config alone."""

from dataclasses import asdict
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mhmoe.configuration import Costs, MHMoEConfig, costs


T = TypeVar("T", bound=PreTrainedModel)


def encoders_of(config: Any) -> dict[str, Any]:
    """The configs of a twin's encoders, by the field that holds each; without a name, the model's own."""
    own = {"": config} if hasattr(config, "moe_config") else {}
    return own | {name: getattr(config, name) for name in getattr(config, "towers", dict)()}


def encoder_costs(model: PreTrainedModel) -> Costs:
    """
    Costs of a twin, as [`mhmoe.configuration.costs`] counts those of a decoder. Multiply-adds are per token that
    passes all of the model's encoders; those of projections leave out patches, poolers and heads.

    Args:
        model: best on the device "meta".
    """
    counted = [_stack_costs(config.moe_config) for config in encoders_of(model.config).values()]
    total = {name: sum(getattr(stack, name) for stack in counted) for name in asdict(counted[0])}
    parameters = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    unused = total["parameters"] - total["active_parameters"]
    return Costs(**{**total, "parameters": parameters, "active_parameters": parameters - unused})


def _stack_costs(config: MHMoEConfig) -> Costs:
    stack = costs(config)
    projections = 4 * config.hidden_size**2 * config.num_hidden_layers
    return Costs(**{**asdict(stack), "projection_multiply_adds": projections})


def on_meta(model_class: type[T], config: PreTrainedConfig) -> T:
    """The model without any memory."""
    with torch.device("meta"):
        return model_class(config)
