"""MH-MoE configuration. This file travels to the Hub: it imports only transformers and its own dependencies."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class MHMoEConfig(LlamaConfig):
    r"""
    Configuration of an MH-MoE decoder: Llama (whose fields are all kept) with Multi-Head Mixture-of-Experts layers in
    place of its FFNs, and with the attention of Mistral, Qwen2, Qwen3 or SmolLM3 where the fields below ask for it.
    P1 is arXiv 2404.15045, P2 is arXiv 2411.16205. The defaults are P2's "head=2" layer at its hidden size of 768, in
    every decoder layer.

    Args:
        sliding_window (`int`, *optional*):
            Tokens that a token sees, itself included, in the layers whose type is "sliding_attention".
        layer_types (`list[str]`, *optional*):
            "full_attention" or "sliding_attention" for every layer; by default all slide if there is a
            `sliding_window`, and none otherwise.
        no_rope_layers (`list[int]`, *optional*):
            For every layer, as in SmolLM3, 1 if it rotates queries and keys and **0 if it has no positions**; by
            default all rotate.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            Whether queries and keys pass an RMS norm over each head, before they are rotated, as in Qwen3.
        attention_out_bias (`bool`, *optional*):
            Whether the attention's output projection has a bias; by default as `attention_bias`, which then is of the
            query, key and value projections alone.
        num_moe_heads (`int`, *optional*, defaults to 2):
            Sub-tokens that every token is split into, h in the papers; divides `hidden_size`. 1 is a plain sparse MoE:
            no split, no head layer, no merge layer.
        num_experts (`int`, *optional*, defaults to 40):
            Routed experts in each MH-MoE layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that each **sub-token** is routed to, so a token reaches up to `num_moe_heads` times as many.
        moe_intermediate_size (`int`, *optional*, defaults to 768):
            Inner size of one routed expert, whose input and output have `hidden_size / num_moe_heads` numbers.
        shared_expert_intermediate_size (`int`, *optional*, defaults to 0):
            Inner size of the expert that every whole token passes, ungated; 0 for none.
        norm_topk_prob (`bool`, *optional*, defaults to `False`):
            Whether the weights of the chosen experts are scaled to sum to one. The papers keep the softmax's values.
        decoder_sparse_step (`int`, *optional*, defaults to 1):
            Every how many layers the FFN is an MH-MoE layer; both papers use 2.
        mlp_only_layers (`list[int]`, *optional*, defaults to `[]`):
            Layers (from 0) that keep a dense FFN of `intermediate_size` whatever `decoder_sparse_step` says.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the load balancing loss (P1 eq. 10) in the training loss.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the model returns its router logits, and adds the load balancing loss to the loss.

    Raises:
        ValueError: a field's value is impossible, alone or beside another's; the message names field and value.

    ```python
    >>> from mhmoe import MHMoEConfig, MHMoEForCausalLM

    >>> config = MHMoEConfig(num_moe_heads=3, num_experts=96, num_experts_per_tok=3, moe_intermediate_size=512)
    >>> model = MHMoEForCausalLM(config)
    ```
    """

    model_type = "mhmoe"
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    use_qk_norm: bool = False
    attention_out_bias: bool | None = None
    num_moe_heads: int = 2
    num_experts: int = 40
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 768
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    router_aux_loss_coef: float | int = 0.01
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        self.mlp_only_layers = [] if self.mlp_only_layers is None else self.mlp_only_layers
        if self.num_attention_heads < 1:  # Llama divides by it before `_validate_sizes` sees it
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must be at least 1.")
        if self.layer_types is None:
            layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        super().__post_init__(**kwargs)
        self._validate_sizes()
        self._validate_layers()
        self.base_model_tp_plan = self._tp_plan_of_present_modules()

    @property
    def moe_layers(self) -> list[int]:
        """Indices (from 0) of the decoder layers whose FFN is an MH-MoE layer."""
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        ]

    def _validate_sizes(self):
        # Not in `validate_architecture`: the library turns what that raises into an exception that is no ValueError.
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
            "num_moe_heads",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "decoder_sparse_step",
        ):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        for field in ("shared_expert_intermediate_size", "router_aux_loss_coef"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        for field, divisor in (
            ("hidden_size", "num_attention_heads"),
            ("hidden_size", "num_moe_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, field) % getattr(self, divisor) != 0:
                raise ValueError(
                    f"{divisor}={getattr(self, divisor)} does not divide {field}={getattr(self, field)}; "
                    f"choose a divisor of {getattr(self, field)}."
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}; "
                "a sub-token cannot be routed to more experts than there are."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation that transformers knows.")
        if self.rope_parameters.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_parameters={self.rope_parameters} must be one set, with a rope_type that transformers knows."
            )

    def _validate_layers(self):
        if misplaced := [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]:
            raise ValueError(
                f"mlp_only_layers={self.mlp_only_layers} names layer {misplaced[0]}, but num_hidden_layers="
                f"{self.num_hidden_layers}: layers count from 0 to {self.num_hidden_layers - 1}."
            )
        for field, choices in (("layer_types", ("full_attention", "sliding_attention")), ("no_rope_layers", (0, 1))):
            layers = getattr(self, field)
            if layers is None:
                continue
            if unknown := [layer for layer in layers if layer not in choices]:
                raise ValueError(
                    f"{field}={layers} holds {unknown[0]!r}; a layer is {choices[0]!r} or {choices[1]!r}."
                )
            if len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"{field}={layers} is for {len(layers)} layers, but num_hidden_layers={self.num_hidden_layers}."
                )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError(f"layer_types={self.layer_types} has sliding layers, which need a sliding_window.")

    def _tp_plan_of_present_modules(self) -> dict[str, str]:
        # The library expects every rule to meet a parameter, and which modules a model has depends on these fields.
        absent = [] if self.use_qk_norm else ["layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"]
        if not self.moe_layers:
            absent.append("layers.*.mlp.experts")
        if not self.moe_layers or not self.shared_expert_intermediate_size:
            absent.append("layers.*.mlp.shared_expert")
        if len(self.moe_layers) == self.num_hidden_layers:
            absent += [f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")]
        return {
            rule: style for rule, style in type(self).base_model_tp_plan.items() if not rule.startswith(tuple(absent))
        }


__all__ = ["MHMoEConfig"]
