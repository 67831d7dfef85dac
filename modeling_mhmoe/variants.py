"""Which class each part of an MH-MoE model has: what the config asks for is decided here, and nowhere else.

This file travels to the Hub: it imports only torch, transformers and its siblings.
"""

from torch import nn

from .bitnet import PackedExperts, TernaryExperts, use_bit_linear
from .configuration_mhmoe import MHMoEConfig
from .experts import EXPERTS, MHMoEMLP, MHMoETwoMatrixMLP, keeping
from .projections import Conv1dSplit, linear_layers, mark_start
from .quantization import use_bitsandbytes
from .routers import ROUTERS


def make_router(config: MHMoEConfig) -> nn.Module:
    """What `router_input` says -> router logits (S, E), weights (S, k) and indices (S, k) of the chosen experts."""
    return ROUTERS[config.router_type, config.router_bias_update_rate > 0](config)


def make_experts(config: MHMoEConfig) -> nn.Module:
    """(S, d/h), weights (S, k), indices (S, k) -> (S, d/h)."""
    experts_class = EXPERTS[config.experts_kind]
    if config.use_bitnet:
        experts_class = keeping(PackedExperts if config.bitnet_packed else TernaryExperts, experts_class)
    experts = experts_class(config)
    if config.experts_quantization is not None:
        use_bitsandbytes(experts, config.experts_quantization)
    return experts


def make_mlp(config: MHMoEConfig, intermediate_size: int) -> nn.Module:
    """A dense FFN or shared expert, (B, T, d) -> (B, T, d)."""
    return (MHMoEMLP if config.gated_mlp else MHMoETwoMatrixMLP)(config, intermediate_size)


def make_head_layer(config: MHMoEConfig) -> nn.Module:
    """What comes before the split (P1 eq. 2): (B, T, d) -> (B, T, l), the h sub-tokens of a token side by side."""
    sizes = [config.hidden_size] + config.layer_depths[0] * [config.latent_size]
    head = Conv1dSplit(config) if config.token_split == "conv1d" else linear_layers(config, sizes)
    return mark_start(head, config, gain=2**-0.5)


def make_merge_layer(config: MHMoEConfig) -> nn.Module:
    """What comes after the heads' outputs are side by side again (P1 eq. 7): (B, T, l) -> (B, T, d)."""
    sizes = config.layer_depths[1] * [config.latent_size] + [config.hidden_size]
    return mark_start(linear_layers(config, sizes), config, gain=1.0)


def make_linear_layers(layer: nn.Module, config: MHMoEConfig) -> None:
    """Makes all linear layers inside a decoder layer what `config` asks for."""
    if config.use_bitnet:
        use_bit_linear(layer, config.bitnet_packed)
