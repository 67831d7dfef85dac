"""The MH-MoE block in float32, on every experts backend, against the float64 reference: outputs and gradients."""

from functools import cache

import pytest
import reference
import torch
from tiny import tiny_config

from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoEDecoderLayer, MHMoESparseMoeBlock


TOLERANCE = 1e-5  # of the largest number in a tensor
SHAPE = (2, 3, 48)  # (B, T, d)
BACKENDS = ["eager", "grouped_mm", "batched_mm", "subtoken"]


def make_config(**fields):
    sizes = {"hidden_size": SHAPE[-1], "num_experts": 5, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    return tiny_config(**{**sizes, **fields})


def make_block(fields: dict) -> MHMoESparseMoeBlock:
    block = MHMoEDecoderLayer(make_config(**fields), 0).mlp
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    for name, buffer in block.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of the size of a gate, so that it changes some choices
            torch.nn.init.normal_(buffer, std=0.2, generator=generator)
    return block


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the weights of the sum of outputs whose gradient is taken."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def linear_layers(leaves: dict[str, torch.Tensor], name: str) -> reference.Layers:
    weights = sorted(leaf for leaf in leaves if leaf.startswith(name) and leaf.endswith("weight"))
    return [(leaves[weight], leaves.get(weight.removesuffix("weight") + "bias")) for weight in weights]


def reference_weights(config, leaves: dict[str, torch.Tensor]) -> dict:
    """The reference's weights by the names that the block gives its parameters."""
    weights = {
        "router": {name.removeprefix("gate."): leaf for name, leaf in leaves.items() if name.startswith("gate.")},
        "expert_down": leaves["experts.down_proj"],
        "head": linear_layers(leaves, "head_layer"),
        "merge": linear_layers(leaves, "merge_layer"),
    }
    if config.experts_kind == "gated":
        gate, up = leaves["experts.gate_up_proj"].chunk(2, dim=1)
        weights |= {"expert_gate": gate, "expert_up": up}
    else:
        weights["expert_up"] = leaves["experts.up_proj"]
    if config.shared_expert_intermediate_size:
        names = ("gate", "up", "down") if config.gated_mlp else ("up", "down")
        weights |= {f"shared_{name}": leaves[f"shared_expert.{name}_proj.weight"] for name in names}
    if config.token_split == "conv1d":
        weights |= {
            "kernels": leaves["head_layer.conv.weight"][:, 0],
            "stride": config.conv_stride or config.num_moe_heads,
        }
        weights["kernel_biases"] = leaves.get("head_layer.conv.bias")
    if config.router_type == "xmoe":
        start = config.router_temperature or {"softmax": 0.3, "sigmoid": 0.07}[config.scoring_func]
        weights["router"]["temperature"] = start * torch.exp(leaves["gate.log_temperature"][0])
    if config.router_bias_update_rate:
        weights["selection_bias"] = leaves["gate.e_score_correction_bias"]
    return weights


@cache
def expected(**fields) -> tuple[dict[str, torch.Tensor], reference.Routing]:
    """The reference's output and gradients, under the names that the block gives its parameters, and its routing."""
    config, block = make_config(**fields), make_block(fields)
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in block.named_parameters()}
    tokens, output_weights = (tensor.double() for tensor in data())
    tokens.requires_grad_()
    output, routing = reference.mhmoe_layer(
        tokens.flatten(0, 1),
        reference_weights(config, leaves | {name: buffer.double() for name, buffer in block.named_buffers()}),
        config.num_moe_heads,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        router_logits=reference.ROUTER_LOGITS[config.router_type],
        act={"silu": reference.silu, "relu": reference.relu}[config.hidden_act],
        scoring={"softmax": reference.softmax, "sigmoid": reference.sigmoid}[config.scoring_func],
        residual=config.sub_token_residual,
        product=reference.bitnet_product if config.use_bitnet else reference.product,
        private=config.private_experts,
        router_input=config.router_input,
    )
    output = output.view(SHAPE)
    (output * output_weights).sum().backward()
    results = {"output": output.detach(), "input": tokens.grad} | {name: leaf.grad for name, leaf in leaves.items()}
    return results, routing


def assert_agrees_with_reference(backend: str, **fields):
    block = make_block(fields)
    block.experts.config._experts_implementation = backend
    tokens, output_weights = data()
    tokens.requires_grad_()
    output = block(tokens)
    (output * output_weights).sum().backward()
    actual = {"output": output.detach(), "input": tokens.grad}
    actual |= {name: parameter.grad for name, parameter in block.named_parameters()}

    results, _ = expected(**fields)
    assert actual.keys() == results.keys()
    for name, value in results.items():
        scale = value.abs().max()
        if name.startswith("gate.") and fields.get("num_experts_per_tok") == 1 and fields.get("norm_topk_prob"):
            # the one weight is 1 whatever the router says, so what float32 leaves is measured against the input's
            scale = results["input"].abs().max()
        elif name == "gate.log_temperature":  # one number, a sum whose terms cancel
            scale = results["gate.weight"].abs().max()
        difference = (actual[name].double() - value).abs().max()
        assert difference <= TOLERANCE * scale, f"{name}: {difference / scale:.1e} relative"


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["softmax", "normalised"])
@pytest.mark.parametrize("shared", [0, 12], ids=["routed", "shared"])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3])
@pytest.mark.parametrize("num_moe_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_agrees_with_reference(backend, num_moe_heads, num_experts_per_tok, shared, norm_topk_prob):
    assert_agrees_with_reference(
        backend,
        num_moe_heads=num_moe_heads,
        num_experts_per_tok=num_experts_per_tok,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=norm_topk_prob,
    )


VARIANTS = [
    {"gated_mlp": False, "hidden_act": "relu", "shared_expert_intermediate_size": 12},
    {"gated_mlp": False, "num_moe_heads": 1, "norm_topk_prob": True},
    {"head_layer_depth": 0},
    {"merge_layer_depth": 0},
    {"head_layer_depth": 0, "merge_layer_depth": 0},
    {"head_layer_depth": 2, "merge_layer_depth": 3, "head_merge_bias": True},
    {"num_moe_heads": 1, "head_layer_depth": 1, "merge_layer_depth": 1},
    {"head_merge_bias": True, "sub_token_residual": True, "shared_expert_intermediate_size": 12},
    {"num_moe_heads": 1, "sub_token_residual": True},
    {"token_split": "conv1d"},
    {"token_split": "conv1d", "num_moe_heads": 4, "conv_kernel_size": 9, "conv_stride": 4, "head_merge_bias": True},
    {"token_split": "conv1d", "conv_kernel_size": 1, "merge_layer_depth": 0},
    {"router_type": "xmoe"},
    {"router_type": "xmoe", "num_moe_heads": 1, "norm_topk_prob": True},
    {"router_type": "xmoe", "num_moe_heads": 3, "router_dim": 7, "router_temperature": 0.5},
    {"router_type": "xmoe", "scoring_func": "sigmoid"},
    {"router_type": "xmoe", "scoring_func": "sigmoid", "norm_topk_prob": True, "router_temperature": 1},
    {"router_bias_update_rate": 0.1},
    {"router_bias_update_rate": 0.1, "router_type": "xmoe", "scoring_func": "sigmoid", "norm_topk_prob": True},
    {"use_bitnet": True, "shared_expert_intermediate_size": 12, "head_merge_bias": True},
    {"use_bitnet": True, "num_moe_heads": 1, "norm_topk_prob": True},
    {"use_bitnet": True, "gated_mlp": False, "head_layer_depth": 2, "head_merge_bias": True, "router_type": "xmoe"},
    {"private_experts": True},
    {"private_experts": True, "num_moe_heads": 4, "norm_topk_prob": True, "shared_expert_intermediate_size": 12},
    {"private_experts": True, "router_bias_update_rate": 0.1, "num_moe_heads": 3, "num_experts": 3},
    {"private_experts": True, "router_input": "token", "gated_mlp": False, "hidden_act": "relu"},
    {"private_experts": True, "router_input": "latent", "sub_token_residual": True, "moe_latent_size": 24},
    {"router_input": "token", "router_bias_update_rate": 0.1, "num_moe_heads": 3},
    {"router_input": "latent", "num_moe_heads": 4, "token_split": "conv1d"},
    {"router_input": "token", "head_layer_depth": 0},
    {"moe_latent_size": 16, "head_merge_bias": True},
    {"moe_latent_size": 72, "num_moe_heads": 3, "head_layer_depth": 2, "merge_layer_depth": 3},
    {"moe_latent_size": 36, "num_moe_heads": 3, "router_type": "xmoe", "experts_type": "two_matrix"},
    {"moe_latent_size": 24, "use_bitnet": True, "private_experts": True},
    # LatentMoE's layer (arXiv 2601.18089, eq. 2), and MH-LatentMoE's (arXiv 2602.04870)
    {"num_moe_heads": 1, "moe_latent_size": 16, "router_input": "token", "shared_expert_intermediate_size": 12},
    {"num_moe_heads": 4, "private_experts": True, "experts_type": "two_matrix", "hidden_act": "relu"},
    # P1's layer, all of it
    {
        "num_moe_heads": 4,
        "gated_mlp": False,
        "hidden_act": "relu",
        "router_type": "xmoe",
        "head_merge_bias": True,
        "sub_token_residual": True,
    },
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variant_agrees_with_reference(backend, fields):
    assert_agrees_with_reference(backend, **fields)


def test_cases_reach_most_experts_and_leave_some_idle():
    """What the comparison would be blind to: experts that no sub-token reaches anywhere, or none that stay idle."""

    def gradients(**fields) -> torch.Tensor:
        return expected(shared_expert_intermediate_size=0, norm_topk_prob=False, **fields)[0]["experts.down_proj"]

    idle = [
        expert
        for expert, gradient in enumerate(gradients(num_moe_heads=1, num_experts_per_tok=1))
        if not gradient.any()
    ]
    assert 0 < len(idle) < 4
    assert all(gradient.any() for gradient in gradients(num_moe_heads=4, num_experts_per_tok=3))


def test_case_with_a_bias_chooses_otherwise():
    (_, with_bias), (_, without) = expected(router_bias_update_rate=0.1), expected()
    assert [chosen for _, chosen in with_bias] != [chosen for _, chosen in without]
