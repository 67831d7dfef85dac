"""The MH-MoE block in float32, on every experts backend, against the float64 reference: outputs and gradients."""

from functools import cache

import pytest
import reference
import torch
from tiny import tiny_config

from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


TOLERANCE = 1e-5  # of the largest number in a tensor
SHAPE = (2, 3, 48)  # (B, T, d)


def make_block(num_moe_heads: int, num_experts_per_tok: int, shared: int, norm_topk_prob: bool) -> MHMoESparseMoeBlock:
    config = tiny_config(
        hidden_size=SHAPE[-1],
        num_moe_heads=num_moe_heads,
        num_experts=5,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=norm_topk_prob,
    )
    block = MHMoESparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return block


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the weights of the sum of outputs whose gradient is taken."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


@cache
def expected(
    num_moe_heads: int, num_experts_per_tok: int, shared: int, norm_topk_prob: bool
) -> dict[str, torch.Tensor]:
    """The reference's output and gradients, under the names that the block gives its parameters."""
    block = make_block(num_moe_heads, num_experts_per_tok, shared, norm_topk_prob)
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in block.named_parameters()}
    tokens, output_weights = (tensor.double() for tensor in data())
    tokens.requires_grad_()
    weights = {
        "gate": leaves["gate.weight"],
        "expert_gate": leaves["experts.gate_up_proj"][:, :8],
        "expert_up": leaves["experts.gate_up_proj"][:, 8:],
        "expert_down": leaves["experts.down_proj"],
    }
    if num_moe_heads > 1:
        weights |= {"head": leaves["head_layer.weight"], "merge": leaves["merge_layer.weight"]}
    if shared:
        weights |= {f"shared_{name}": leaves[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")}
    output, _ = reference.mhmoe_layer(
        tokens.flatten(0, 1), weights, num_moe_heads, num_experts_per_tok, norm_topk_prob
    )
    output = output.view(SHAPE)
    (output * output_weights).sum().backward()
    return {"output": output.detach(), "input": tokens.grad} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["softmax", "normalised"])
@pytest.mark.parametrize("shared", [0, 12], ids=["routed", "shared"])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3])
@pytest.mark.parametrize("num_moe_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "subtoken"])
def test_block_agrees_with_reference(backend, num_moe_heads, num_experts_per_tok, shared, norm_topk_prob):
    case = (num_moe_heads, num_experts_per_tok, shared, norm_topk_prob)
    block = make_block(*case)
    block.experts.config._experts_implementation = backend
    tokens, output_weights = data()
    tokens.requires_grad_()
    output = block(tokens)
    (output * output_weights).sum().backward()
    actual = {"output": output.detach(), "input": tokens.grad}
    actual |= {name: parameter.grad for name, parameter in block.named_parameters()}

    assert actual.keys() == expected(*case).keys()
    for name, value in expected(*case).items():
        scale = value.abs().max()
        if name == "gate.weight" and num_experts_per_tok == 1 and norm_topk_prob:
            # the one weight is 1 whatever the router says, so what float32 leaves is measured against the input's
            scale = expected(*case)["input"].abs().max()
        difference = (actual[name].double() - value).abs().max()
        assert difference <= TOLERANCE * scale, f"{name}: {difference / scale:.1e} relative"


def test_cases_reach_most_experts_and_leave_some_idle():
    """What the comparison would be blind to: experts that no sub-token reaches anywhere, or none that stay idle."""
    gradients = expected(1, 1, 0, False)["experts.down_proj"]
    idle = [expert for expert, gradient in enumerate(gradients) if not gradient.any()]
    assert 0 < len(idle) < 4
    assert all(gradient.any() for gradient in expected(4, 3, 0, False)["experts.down_proj"])
