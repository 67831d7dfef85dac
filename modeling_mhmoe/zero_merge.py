"""A merge layer of zeros, as a conversion with the strategy "exact" starts with, passes no gradient on.

All training of the model moves it first; adapters of what comes before it alone never would, and nothing would say so.
This file travels to the Hub: it imports only torch, transformers and its siblings.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .quantization import is_torchao


logger = logging.get_logger(__name__)


def warn_if_cut_off(model: Any, args: tuple) -> None:
    """
    A forward pre-hook of the base model. It warns once, in one line, where the merge layers are frozen and zero while
    something before them (head layer, router, experts, or an adapter of these) is to be trained.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or model.merge_layers_seen:
        return
    blocks = model.moe_blocks
    frozen = [block for block in blocks if not _moves(block.merge_layer)]
    waiting = [block for block in frozen if any(map(_is_trained, (block.head_layer, block.gate, block.experts)))]
    if not waiting:
        return  # not yet an answer: adapters may still come
    model.merge_layers_seen = True
    zero = [block for block in waiting if any(map(_is_zero, block.merge_layer.parameters()))]
    if zero:
        logger.warning(
            f"merge_layer is zero and frozen in {len(zero)} of {len(blocks)} MH-MoE layers, as a conversion with "
            "strategy exact starts: from the cross entropy, head_layer, gate and experts get gradients of exactly 0. "
            "Train it too (in PEFT, add 'merge_layer' to target_modules or modules_to_save), or convert with "
            "--strategy anchored."
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _moves(merge_layer: nn.Module) -> bool:
    """Whether its matrices change; a bias alone changes the output, and lets no gradient through."""
    return any(parameter.requires_grad and parameter.dim() > 1 for parameter in merge_layer.parameters())


def _is_zero(weight: torch.Tensor) -> bool:
    """Of a matrix, or of this process's part; a packed one is where all its bytes are the same."""
    weight = getattr(weight, "_local_tensor", weight)
    weight = weight.dequantize() if is_torchao(weight) else weight
    if weight.dim() < 2 or not weight.numel():  # a bias; another process has it
        return False
    return not (weight.any() if weight.is_floating_point() else (weight != weight.flatten()[0]).any())
