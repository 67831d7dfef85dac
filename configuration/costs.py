"""Parameters and multiply-adds of a Llama-style decoder, dense or MH-MoE, from its config alone."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


# what a dense family has without a field that says so, in the words of MHMoEConfig
IMPLIED_FIELDS = {
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"use_qk_norm": True},
}


@dataclass(frozen=True)
class Costs:
    """
    What a model costs.

    Attributes:
        parameters: parameters in all; a tied embedding counts once.
        active_parameters: those that one token meets at most: of the routed experts `num_moe_heads *
            num_experts_per_tok` per layer, or all if there are fewer.
        ffn_multiply_adds: multiply-adds per token in all FFNs: head and merge layers, routed and shared experts, dense
            FFNs (P2, section "FLOPs parity": 2 d^2 + 3 d i k, and 3 d i for a dense SwiGLU; an FFN that is not gated
            has 2 in place of 3, and each further head or merge layer d^2 more). With a latent size l it is
            2 d l + 3 l i k.
        router_multiply_adds: multiply-adds per token in all routers, which the papers leave out of the comparison.
        projection_multiply_adds: multiply-adds per token in all attention projections and the output embedding.
        expert_parameters: those of all routed experts (P1, table 11).
        ffn_parameters: those of what `ffn_multiply_adds` counts, all routed experts included.
    """

    parameters: int
    active_parameters: int
    ffn_multiply_adds: int
    router_multiply_adds: int
    projection_multiply_adds: int
    expert_parameters: int
    ffn_parameters: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token with any weight; attention's scores, which depend on the text's length, are none."""
        return self.ffn_multiply_adds + self.router_multiply_adds + self.projection_multiply_adds


def costs(config: PreTrainedConfig) -> Costs:
    """Costs of the causal language model that `config` describes: MH-MoE's or a dense family's that is converted."""

    def field(name: str, default: object = None):
        return IMPLIED_FIELDS.get(config.model_type, {}).get(name, getattr(config, name, default))

    d = config.hidden_size
    head_dim = field("head_dim") or d // config.num_attention_heads
    mlp_bias = bool(field("mlp_bias", False))
    attention_bias = bool(field("attention_bias", False))
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    attention = 2 * d * (queries + keys)
    projections = config.num_hidden_layers * attention + config.vocab_size * d
    attention += attention_bias * (queries + 2 * keys) + bool(field("attention_out_bias", attention_bias)) * d
    attention += bool(field("use_qk_norm", False)) * 2 * head_dim

    matrices = field("ffn_matrices", 3)

    def mlp_parameters(inner_size: int) -> int:
        return matrices * d * inner_size + mlp_bias * ((matrices - 1) * inner_size + d)

    moe_layers = len(config.moe_layers) if config.model_type == "mhmoe" else 0
    dense_layers = config.num_hidden_layers - moe_layers
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    always = embeddings + config.num_hidden_layers * (attention + 2 * d) + d
    ffn_parameters = dense_layers * mlp_parameters(config.intermediate_size)
    ffn_multiply_adds = dense_layers * matrices * d * config.intermediate_size
    if not moe_layers:
        always += ffn_parameters
        return Costs(always, always, ffn_multiply_adds, 0, projections, 0, ffn_parameters)

    h, experts, top_k = config.num_moe_heads, config.num_routed_experts, config.num_experts_per_tok
    shared = config.shared_expert_intermediate_size
    mixing, mixing_multiply_adds = _head_and_merge_layers(config)
    router = config.router.parameters(config)
    expert = config.expert.parameters(config)
    ffn_parameters += moe_layers * (mixing + (mlp_parameters(shared) if shared else 0))
    ffn_multiply_adds += moe_layers * (
        mixing_multiply_adds + h * top_k * config.expert.multiply_adds(config) + matrices * d * shared
    )
    always += ffn_parameters + moe_layers * router
    expert_parameters = moe_layers * experts * expert
    return Costs(
        parameters=always + expert_parameters,
        active_parameters=always + moe_layers * min(h * top_k, experts) * expert,
        ffn_multiply_adds=ffn_multiply_adds,
        router_multiply_adds=moe_layers * h * config.router.multiply_adds(config),
        projection_multiply_adds=projections,
        expert_parameters=expert_parameters,
        ffn_parameters=ffn_parameters + expert_parameters,
    )


def _head_and_merge_layers(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters, and multiply-adds per token, of one layer's head and merge layers."""
    d, latent, heads = config.hidden_size, config.latent_size, config.num_moe_heads
    head, merge = config.layer_depths
    between = max(head - 1, 0) + max(merge - 1, 0)  # further layers, in the latent size
    multiply_adds = ((head > 0) + (merge > 0)) * d * latent + between * latent**2
    biases = config.head_merge_bias * (head * latent + max(merge - 1, 0) * latent + (merge > 0) * d)
    if config.token_split == "linear":
        return multiply_adds + biases, multiply_adds
    kernel_size, _ = config.conv_sizes
    merging = merge * (d * d + config.head_merge_bias * d)
    return merging + heads * (kernel_size + config.head_merge_bias), merge * d * d + d * kernel_size
