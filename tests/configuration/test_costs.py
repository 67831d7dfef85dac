"""Counts from the config's formulas against real modules on the meta device."""

import random

import pytest
import torch
from configs import mhmoe_configs
from hypothesis import given, settings
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mhmoe import MHMoEForCausalLM
from mhmoe.configuration import costs


VARIANTS = [
    {},
    {"num_moe_heads": 1},
    {"num_moe_heads": 4, "num_experts": 3, "num_experts_per_tok": 3},
    {"shared_expert_intermediate_size": 40, "mlp_bias": True, "attention_bias": True},
    {"tie_word_embeddings": True, "head_dim": 20},
    {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    {"num_hidden_layers": 3, "mlp_only_layers": [0, 1, 2]},
    {"gated_mlp": False, "shared_expert_intermediate_size": 40, "mlp_bias": True, "mlp_only_layers": [0]},
    {"head_layer_depth": 0},
    {"head_layer_depth": 2, "merge_layer_depth": 3, "head_merge_bias": True},
    {"num_moe_heads": 1, "head_layer_depth": 1, "merge_layer_depth": 1},
    {"token_split": "conv1d", "conv_kernel_size": 5, "head_merge_bias": True},
    {"router_type": "xmoe"},
    {"router_type": "xmoe", "router_dim": 5, "num_moe_heads": 1, "router_bias_update_rate": 0.1},
    {"use_bitnet": True, "gated_mlp": False},
    {"experts_type": "two_matrix", "shared_expert_intermediate_size": 40},
    {"private_experts": True},
    {"private_experts": True, "num_moe_heads": 4, "router_bias_update_rate": 0.1, "num_experts_per_tok": 6},
    {"router_input": "token"},
    {"router_input": "latent", "private_experts": True, "moe_latent_size": 20},
    {"moe_latent_size": 72, "head_layer_depth": 2, "merge_layer_depth": 3, "head_merge_bias": True},
    {"moe_latent_size": 10, "num_moe_heads": 1, "router_input": "token", "shared_expert_intermediate_size": 24},
    {"moe_latent_size": 30, "num_moe_heads": 3, "router_type": "xmoe"},
]


def linear_multiply_adds(model, part: str) -> int:
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if part in name and isinstance(module, torch.nn.Linear)
    )


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_mhmoe(overrides):
    config = tiny_config(**overrides)
    with torch.device("meta"):
        model = MHMoEForCausalLM(config)
    counted = costs(config)
    assert counted.parameters == model.num_parameters()

    h, k, experts = config.num_moe_heads, config.num_experts_per_tok, config.num_routed_experts
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert counted.active_parameters == model.num_parameters() - routed + routed * min(h * k, experts) // experts
    # a routed expert's multiply-adds are its parameters, once for every sub-token that is sent there
    convolved = sum(
        module.weight.numel() * config.hidden_size // h  # each of a channel's d/h numbers
        for module in model.modules()
        if isinstance(module, torch.nn.Conv1d)
    )
    ffns = linear_multiply_adds(model, ".mlp.") + routed * h * k // experts
    assert counted.ffn_multiply_adds == ffns + convolved
    matrices = [parameter for name, parameter in model.named_parameters() if ".gate." in name and parameter.dim() == 2]
    gates = sum(parameter.numel() for parameter in matrices) * (1 if config.has_rows_by_head else h)
    assert counted.router_multiply_adds == gates
    outside = linear_multiply_adds(model, ".self_attn.") + linear_multiply_adds(model, "lm_head")
    assert counted.multiply_adds == ffns + convolved + gates + outside
    assert counted.expert_parameters == routed
    assert counted.ffn_parameters == sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name and ".gate." not in name
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(mhmoe_configs())
def test_any_config(config):
    with torch.device("meta"):
        model = MHMoEForCausalLM(config)
    counted = costs(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counted.parameters == model.num_parameters()
    assert counted.expert_parameters == sum(size for name, size in sizes.items() if ".experts." in name)
    assert counted.ffn_parameters == sum(
        size for name, size in sizes.items() if ".mlp." in name and ".mlp.gate." not in name
    )


def random_fields(seed: int) -> dict:
    choose = random.Random(seed).choice
    heads = choose([1, 2, 3, 4])
    fields = {"num_moe_heads": heads, "num_experts": choose([2, 5]), "num_experts_per_tok": choose([1, 2])}
    fields |= {"experts_type": choose([None, "gated", "two_matrix"]), "gated_mlp": choose([True, False])}
    fields |= {"moe_intermediate_size": choose([8, 24]), "shared_expert_intermediate_size": choose([0, 16])}
    fields |= {"sub_token_residual": choose([True, False]), "router_bias_update_rate": choose([0, 0.1])}
    if latent := choose([None, 12, 96]):
        fields |= {"moe_latent_size": latent, "head_layer_depth": choose([1, 2]), "merge_layer_depth": choose([1, 3])}
        fields |= {"head_merge_bias": choose([True, False])}
    if heads > 1:
        fields |= {"private_experts": choose([True, False]), "router_input": choose(["sub_token", "token", "latent"])}
    elif latent:
        fields |= {"router_input": choose(["sub_token", "token"])}
    return fields


@pytest.mark.parametrize("seed", range(40))
def test_random_config_costs_what_it_has_and_does(seed):
    config = tiny_config(**random_fields(seed), num_hidden_layers=1, experts_implementation="eager")
    model = MHMoEForCausalLM(config)
    counted = costs(config)
    assert counted.parameters == model.num_parameters()
    tokens = torch.randn(2, 5, config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.layers[0].mlp(tokens)
    assert counter.get_total_flops() == 2 * 10 * (counted.ffn_multiply_adds + counted.router_multiply_adds)


def test_dense():
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    counted = costs(config)
    assert counted.parameters == counted.active_parameters == model.num_parameters()
    assert counted.ffn_multiply_adds == counted.ffn_parameters == linear_multiply_adds(model, ".mlp.")
    assert counted.multiply_adds == linear_multiply_adds(model, "")
    assert counted.expert_parameters == 0


def test_flops_parity_of_p2():
    # P2's settings: with these inner sizes its MH-MoE layers cost what its sparse MoE does
    plain = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 1}
    fields = ("num_moe_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    for setting in [(1, 8, 1, 2048), (1, 16, 2, 1024), (2, 40, 2, 768), (3, 96, 3, 512)]:
        config = tiny_config(**plain, **dict(zip(fields, setting, strict=True)))
        assert costs(config).ffn_multiply_adds == 3 * 768 * 2048
