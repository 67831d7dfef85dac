"""Parity of multiply-adds and parameters: P2's worked examples, and the config's own counts."""

import pytest
from tiny import tiny_config
from transformers import LlamaConfig

from mhmoe.configuration import costs
from mhmoe.configuration.parity import experts_for, intermediate_size_for, match_dense, match_smoe


# P2's experiment: d=768, SMoE of 8 SwiGLU experts of 2048, top-1
@pytest.mark.parametrize(("heads", "size", "solved", "experts"), [(2, 768, 41.33, 40), (3, 512, 93.0, 96)])
def test_p2_experiment(heads, size, solved, experts):
    parity = match_smoe(768, heads, heads, reference_size=2048)
    assert parity.solved_intermediate_size == parity.moe_intermediate_size == size
    assert parity.solved_experts == pytest.approx(solved, abs=0.005)
    assert parity.num_experts == experts


@pytest.mark.parametrize("d", [96, 768])
@pytest.mark.parametrize("experts", [8, 32])
def test_p2_example_without_gates(d, experts):
    # i = 4 d and k = 1 become i = 3 d, and E experts 4 E - 1
    size = intermediate_size_for(2 * d * 4 * d, d, heads=3, top_k=1, matrices=2)
    assert size == 3 * d
    assert experts_for(2 * d * 4 * d * experts, d, 3, size, matrices=2) == pytest.approx(4 * experts - 1)


def test_a_plain_moe_matches_itself():
    parity = match_smoe(768, 1, 1, reference_size=2048)
    assert (parity.moe_intermediate_size, parity.num_experts) == (2048, 8)


@pytest.mark.parametrize(("heads", "top_k"), [(2, 1), (2, 2), (3, 2), (4, 3)])
def test_dense_parity_by_the_configs_own_count(heads, top_k):
    d, inner = 192, 768
    fields = {"hidden_size": d, "intermediate_size": inner}
    target = costs(LlamaConfig(num_hidden_layers=2, **fields)).ffn_multiply_adds
    step = 2 * 3 * d * 8  # what 8 of inner size cost in two layers

    size, shared = match_dense(d, inner, heads, top_k, size=64)
    assert size == 64
    assert shared % 8 == 0
    sizes = {"num_moe_heads": heads, "num_experts_per_tok": top_k, **fields}
    count = costs(tiny_config(**sizes, moe_intermediate_size=size, shared_expert_intermediate_size=shared))
    assert abs(count.ffn_multiply_adds - target) <= step / 2

    size, shared = match_dense(d, inner, heads, top_k, shared_size=320)
    assert shared == 320
    count = costs(tiny_config(**sizes, moe_intermediate_size=size, shared_expert_intermediate_size=shared))
    assert abs(count.ffn_multiply_adds - target) <= step / 2 * top_k


def test_smoe_parity_by_the_configs_own_count():
    fields = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 1}
    smoe = tiny_config(**fields, num_moe_heads=1, num_experts=8, num_experts_per_tok=1, moe_intermediate_size=2048)
    parity = match_smoe(768, 2, 2, reference_size=2048)
    sizes = {"num_experts": parity.num_experts, "moe_intermediate_size": parity.moe_intermediate_size}
    mhmoe = tiny_config(**fields, num_moe_heads=2, num_experts_per_tok=2, **sizes)
    assert costs(mhmoe).ffn_multiply_adds == costs(smoe).ffn_multiply_adds
    assert costs(mhmoe).parameters == pytest.approx(costs(smoe).parameters, rel=0.04)  # 40 experts for 41.3


def test_what_cannot_be_matched_is_named():
    with pytest.raises(ValueError, match="shared_expert_intermediate_size=1536"):
        match_dense(576, 1536, 4, 2, shared_size=1536)
    with pytest.raises(ValueError, match="moe_intermediate_size=900"):
        match_dense(576, 1536, 4, 2, size=900)
    with pytest.raises(ValueError, match="inner size 300"):
        match_smoe(576, 4, 2, reference_size=300)
