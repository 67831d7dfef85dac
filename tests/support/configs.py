"""Any config of an MH-MoE model that is valid, with every variant of the layer, as a strategy of hypothesis."""

from hypothesis import strategies as st

from mhmoe import MHMoEConfig


@st.composite
def mhmoe_configs(draw) -> MHMoEConfig:
    """Small: up to 3 layers, hidden size up to 72."""
    flag = st.booleans
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    attention_heads = draw(st.sampled_from([2, 4, 6]))
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(1, 7))
    fields = {
        "vocab_size": draw(st.sampled_from([32, 37])),
        "hidden_size": draw(st.sampled_from([24, 48, 72])),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": attention_heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 3) if attention_heads % n == 0])),
        "head_dim": draw(st.sampled_from([8, 12])),
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": draw(flag()),
        "attention_bias": draw(flag()),
        "attention_out_bias": draw(st.sampled_from([None, True, False])),
        "use_qk_norm": draw(flag()),
        "mlp_bias": draw(flag()),
        "sliding_window": draw(st.sampled_from([None, 3])),
        "num_moe_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.integers(1, 20)),
        "shared_expert_intermediate_size": draw(st.sampled_from([0, 0, 13])),
        "norm_topk_prob": draw(flag()),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=1)),
        "gated_mlp": draw(flag()),
        "sub_token_residual": draw(flag()),
        "use_bitnet": draw(st.sampled_from([False, False, True])),
        "router_bias_update_rate": draw(st.sampled_from([0.0, 0.1])),
        "router_z_loss_coef": draw(st.sampled_from([0.0, 0.1])),
        "pad_token_id": 0,
    }
    if draw(flag()):
        fields |= {"router_type": "xmoe", "router_dim": draw(st.sampled_from([None, 1, 5]))}
        fields["scoring_func"] = draw(st.sampled_from(["softmax", "sigmoid"]))
    if heads > 1 and not fields["use_bitnet"] and draw(flag()):
        fields |= {"token_split": "conv1d", "conv_kernel_size": draw(st.sampled_from([None, heads, heads + 3]))}
    else:
        fields["head_layer_depth"] = draw(st.sampled_from([None, 0, 1, 2, 3]))
    fields["merge_layer_depth"] = draw(st.sampled_from([None, 0, 1, 2, 3]))
    config = MHMoEConfig(**fields)
    if config.layer_depths != (0, 0):
        fields |= {"head_merge_bias": draw(flag()), "head_merge_init": draw(st.sampled_from(["normal", "xavier"]))}
    return MHMoEConfig(**fields)
