"""Auxiliary-loss-free load balancing (DeepSeek-V3, arXiv 2412.19437, eq. 16): a bias in the choice of experts.

This file travels to the Hub: it imports only torch and its siblings.
Shapes: S sub-tokens, E experts, k experts per sub-token.
"""

import torch
from torch import distributed, nn

from .load_balancing import padding_mask
from .routers import BiasedTopKRouter


def biased_routers(model: nn.Module) -> list[BiasedTopKRouter]:
    """Those of `model`, one for each MH-MoE layer, or none."""
    return [module for module in model.modules() if isinstance(module, BiasedTopKRouter)]


def count_loads(model: nn.Module, args: tuple, kwargs: dict, output) -> None:
    """
    A forward hook of the base model, which adds up what training routes to each expert. Padding does not count, and
    neither do the routers' second forwards of gradient checkpointing, which are not the model's.
    """
    if not model.training or not torch.is_grad_enabled():
        return
    attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    mask = padding_mask(attention_mask, tokens=output[0].shape[1])
    for router in biased_routers(model):
        assert router.chosen is not None  # since this forward
        counted = torch.ones_like(router.chosen)  # (S, k)
        if mask is not None:
            heads = len(router.chosen) // mask.numel()
            counted = counted * mask.reshape(-1, 1).to(counted).repeat_interleave(heads, dim=0)
        loads = torch.zeros(len(router.e_score_correction_bias), dtype=torch.int64, device=counted.device)
        loads = loads.scatter_add(0, router.chosen.flatten(), counted.flatten())
        router.loads = loads if router.loads is None else router.loads + loads


@torch.no_grad()
def update_router_biases(model: nn.Module, rate: float) -> None:
    """Moves each expert's bias by `rate`: up if its load since the last time is below the mean, down if above."""
    # with private experts the mean over all heads is that of each: they have equally many sub-tokens
    routers = biased_routers(model)
    if not routers:
        return
    device = routers[0].weight.device
    nothing = torch.zeros(len(routers[0].e_score_correction_bias), dtype=torch.int64)
    loads = torch.stack([(nothing if router.loads is None else router.loads).to(device) for router in routers])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(loads)
    lacking = (loads.sum(dim=1, keepdim=True) - loads * loads.shape[1]).sign()  # of the mean minus the load
    for router, step in zip(routers, rate * lacking, strict=True):
        router.e_score_correction_bias += step.to(router.e_score_correction_bias)
        router.loads = None
