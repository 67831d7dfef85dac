"""MH-MoE configuration. This file travels to the Hub: it imports only transformers and its own dependencies."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import transformers
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.utils.versions import require_version


require_version("transformers>=5.12")


class RouterType:
    """
    What a config and its costs know of a kind of router, here the softmax router of both papers; its module is in
    `modeling_mhmoe/routers.py`. Another kind is a subclass, made known by `register_router`.

    Attributes:
        fields: fields of the config that are for this kind of router, which others refuse.
    """

    fields: tuple[str, ...] = ()

    def check(self, config: "MHMoEConfig") -> None:
        """Raise a ValueError, naming field and value, if `config` asks for what this router cannot do."""

    def width(self, config: "MHMoEConfig") -> int:
        """Numbers that an expert's row in the router has."""
        return config.hidden_size // config.num_moe_heads

    def parameters(self, config: "MHMoEConfig") -> int:
        """Parameters of the router of one layer."""
        return config.num_experts * self.width(config)

    def multiply_adds(self, config: "MHMoEConfig") -> int:
        """Multiply-adds of the router of one layer for one sub-token."""
        return config.num_experts * self.width(config)


class XMoERouterType(RouterType):
    """X-MoE's router (arXiv 2204.09179): sub-tokens are projected, and there is a temperature."""

    fields = ("router_dim", "router_temperature", "scoring_func")

    def check(self, config: "MHMoEConfig") -> None:
        if config.router_temperature is not None and config.router_temperature <= 0:
            raise ValueError(f"router_temperature={config.router_temperature} must be more than 0.")

    def width(self, config: "MHMoEConfig") -> int:
        return config.router_dim or max(16 // config.num_moe_heads, 1)

    def parameters(self, config: "MHMoEConfig") -> int:
        return self.multiply_adds(config) + 1  # the temperature

    def multiply_adds(self, config: "MHMoEConfig") -> int:
        projection = self.width(config) * config.hidden_size // config.num_moe_heads
        return super().multiply_adds(config) + projection


ROUTER_TYPES: dict[str, RouterType] = {"softmax": RouterType(), "xmoe": XMoERouterType()}  # by `router_type`


@strict
class MHMoEConfig(LlamaConfig):
    r"""
    Configuration of an MH-MoE decoder: Llama (whose fields are all kept) with Multi-Head Mixture-of-Experts layers in
    place of its FFNs, and with the attention of Mistral, Qwen2, Qwen3 or SmolLM3 where the fields below ask for it.
    P1 is arXiv 2404.15045, P2 is arXiv 2411.16205. The defaults are P2's "head=2" layer at its hidden size of 768, in
    every decoder layer.

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Numbers of a token between the layers, d in the papers.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Inner size of the dense FFNs, in the layers that keep one.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Heads of the attention, which are not those that tokens are split into.
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
            no split, and no head and merge layers unless their depths ask for them.
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
        gated_mlp (`bool`, *optional*, defaults to `True`):
            Whether every FFN (dense, shared, routed) is gated, as in P2; otherwise it has two matrices, as in P1.
        head_layer_depth, merge_layer_depth (`int`, *optional*):
            Linear layers in the head and in the merge layer, 0 to 3 with ReLU between (P1 table 7); 0 leaves it out.
            By default 1, and 0 where `num_moe_heads` is 1, to which P2's ablation adds them.
        head_merge_bias (`bool`, *optional*, defaults to `False`):
            Whether head and merge layers have biases, as in P1.
        head_merge_init (`str`, *optional*, defaults to `"normal"`):
            "xavier" starts them Xavier-uniform as in P1, with gain 1/sqrt(2) for the head and 1 for the merge layer.
        token_split (`str`, *optional*, defaults to `"linear"`):
            "conv1d" replaces the head layer by a convolution along a token's numbers, with a channel for each head
            (P1's appendix).
        conv_kernel_size, conv_stride (`int`, *optional*):
            Its kernel and stride, both `num_moe_heads` by default. They must give `hidden_size / num_moe_heads`
            numbers, where a kernel longer than the stride sees as many zeros, half of them at either end.
        sub_token_residual (`bool`, *optional*, defaults to `False`):
            Whether a sub-token is added to the output of its experts (P1 eq. 6).
        router_type (`str`, *optional*, defaults to `"softmax"`):
            "xmoe" is X-MoE's router, P1's: cosines between projected sub-tokens and expert embeddings. Or a router
            that `register_router` made known.
        router_dim (`int`, *optional*):
            Numbers that it projects to, by default `16 / num_moe_heads` rounded down (P1 table 9), at least 1: with
            more than 8 heads give it yourself, since cosines of single numbers are only signs.
        scoring_func (`str`, *optional*, defaults to `"softmax"`):
            "sigmoid" makes its scores sigmoids of the logits instead. The load balancing loss then takes an expert's
            share of a sub-token's scores for its probability.
        router_temperature (`float`, *optional*):
            Start of its learnable temperature, by default 0.3, and 0.07 for sigmoids.
        router_bias_update_rate (`float`, *optional*, defaults to 0.0):
            Step of DeepSeek-V3's auxiliary-loss-free balancing, by which `update_router_biases` moves each expert's
            bias in the choice of experts once per optimizer step; DeepSeek-V3 uses 0.001. 0 for no such bias. The load
            balancing loss remains, unless its coefficient is 0.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), added where the load balancing loss is.
        use_bitnet (`bool`, *optional*, defaults to `False`):
            Whether every linear layer of the decoder layers is BitNet b1.58's, experts, head and merge layers
            included; embeddings, routers, norms and output layers stay as they are. Tensor parallelism splits none.
        bitnet_packed (`bool`, *optional*, defaults to `False`):
            Whether these layers hold ternary weights of 2 bits instead of weights to train; `save_packed` sets it.
        experts_quantization (`str`, *optional*):
            "nf4", "fp4" or "int8" where bitsandbytes holds the experts; `from_pretrained` sets it when it quantizes.

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
        **(LlamaConfig.base_model_tp_plan or {}),
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {  # ty: ignore[invalid-assignment]: the library's own type of it is wrong
        **(Qwen3MoeConfig.base_model_ep_plan or {}),
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
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
    gated_mlp: bool = True
    head_layer_depth: int | None = None
    merge_layer_depth: int | None = None
    head_merge_bias: bool = False
    head_merge_init: Literal["normal", "xavier"] = "normal"
    token_split: Literal["linear", "conv1d"] = "linear"
    conv_kernel_size: int | None = None
    conv_stride: int | None = None
    sub_token_residual: bool = False
    router_type: str = "softmax"
    router_dim: int | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    router_temperature: float | int | None = None
    router_bias_update_rate: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    use_bitnet: bool = False
    bitnet_packed: bool = False
    experts_quantization: Literal["nf4", "fp4", "int8"] | None = None

    from_preset: ClassVar[Callable[..., "MHMoEConfig"]]  # where mhmoe is installed; see its `configuration/presets.py`

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
        self._validate_variants()
        # the scales of BitNet are of whole rows and matrices, which tensor parallelism would split
        tp_plan = {} if self.use_bitnet else self._of_present_modules(type(self).base_model_tp_plan)
        self.base_model_tp_plan = tp_plan  # ty: ignore[invalid-attribute-access]: a model takes its config's
        ep_plan = self._of_present_modules(type(self).base_model_ep_plan)
        self.base_model_ep_plan = ep_plan  # ty: ignore[invalid-attribute-access]

    @property
    def moe_layers(self) -> list[int]:
        """Indices (from 0) of the decoder layers whose FFN is an MH-MoE layer."""
        dense = self.mlp_only_layers or ()
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if layer not in dense and (layer + 1) % self.decoder_sparse_step == 0
        ]

    @property
    def layer_depths(self) -> tuple[int, int]:
        """Linear layers in the head and in the merge layer."""
        default = 1 if self.num_moe_heads > 1 else 0
        head, merge = self.head_layer_depth, self.merge_layer_depth
        return default if head is None else head, default if merge is None else merge

    @property
    def conv_sizes(self) -> tuple[int, int]:
        """Kernel and stride of the convolution that splits tokens."""
        return self.conv_kernel_size or self.num_moe_heads, self.conv_stride or self.num_moe_heads

    @property
    def conv_padding(self) -> tuple[int, int]:
        """Zeros that it sees before and after a token's numbers."""
        kernel_size, stride = self.conv_sizes
        zeros = max(kernel_size - stride, 0)
        return zeros // 2, zeros - zeros // 2

    @property
    def router(self) -> RouterType:
        """What is known of the kind of router that `router_type` names."""
        return ROUTER_TYPES[self.router_type]

    @property
    def ffn_matrices(self) -> int:
        """Matrices of an FFN or expert: gate, up and down, or the last two alone."""
        return 3 if self.gated_mlp else 2

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
            "conv_kernel_size",
            "conv_stride",
            "router_dim",
        ):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        for field in (
            "shared_expert_intermediate_size",
            "router_aux_loss_coef",
            "router_bias_update_rate",
            "router_z_loss_coef",
        ):
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
        if (self.rope_parameters or {}).get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_parameters={self.rope_parameters} must be one set, with a rope_type that transformers knows."
            )

    def _validate_layers(self):
        if misplaced := [layer for layer in self.mlp_only_layers or () if not 0 <= layer < self.num_hidden_layers]:
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
        if self.sliding_window is None and "sliding_attention" in (self.layer_types or ()):
            raise ValueError(f"layer_types={self.layer_types} has sliding layers, which need a sliding_window.")

    def _validate_variants(self):
        for field in ("head_layer_depth", "merge_layer_depth"):
            if getattr(self, field) not in (None, 0, 1, 2, 3):
                raise ValueError(f"{field}={getattr(self, field)} must be from 0 to 3.")
        self._validate_router()
        for field, other, value in (
            ("conv_kernel_size", "token_split", "conv1d"),
            ("conv_stride", "token_split", "conv1d"),
            ("bitnet_packed", "use_bitnet", True),
        ):
            if getattr(self, field) != getattr(type(self), field) and getattr(self, other) != value:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is for {other}={value!r}; set that too, or leave {field} out."
                )
        if self.experts_quantization and self.use_bitnet:
            raise ValueError(
                f"experts_quantization={self.experts_quantization!r} would round once more what use_bitnet=True made "
                "ternary; leave one out."
            )
        if self.token_split == "conv1d":
            self._validate_conv1d()
        for field in ("head_merge_bias", "head_merge_init"):
            if getattr(self, field) != getattr(type(self), field) and self.layer_depths == (0, 0):
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is for head and merge layers, and this model has neither; "
                    f"leave {field} out, or set head_layer_depth or merge_layer_depth."
                )

    def _validate_router(self):
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(
                f"router_type={self.router_type!r} is not known; choose one of {', '.join(ROUTER_TYPES)}, or make "
                "another known with register_router."
            )
        for field in {field for router in ROUTER_TYPES.values() for field in router.fields}:
            takers = [name for name, router in ROUTER_TYPES.items() if field in router.fields]
            value, default = getattr(self, field, None), getattr(type(self), field, None)
            if value != default and self.router_type not in takers:
                raise ValueError(
                    f"{field}={value!r} is for router_type={' or '.join(map(repr, takers))}; set that too, or leave "
                    f"{field} out."
                )
        self.router.check(self)

    def _validate_conv1d(self):
        if self.num_moe_heads == 1:
            raise ValueError("token_split='conv1d' has nothing to split with num_moe_heads=1; give more heads.")
        if self.head_layer_depth not in (None, 1):
            raise ValueError(
                f"head_layer_depth={self.head_layer_depth} is for a head layer, which token_split='conv1d' replaces; "
                "leave it out."
            )
        if self.use_bitnet:
            raise ValueError("use_bitnet=True is for linear layers, and token_split='conv1d' is none; leave one out.")
        kernel_size, stride = self.conv_sizes
        width = self.hidden_size // self.num_moe_heads
        numbers = (self.hidden_size + sum(self.conv_padding) - kernel_size) // stride + 1
        if numbers != width:
            raise ValueError(
                f"conv_stride={stride} with conv_kernel_size={kernel_size} gives each head {numbers} numbers, not "
                f"hidden_size / num_moe_heads = {width}; a stride of {self.num_moe_heads} does with any kernel."
            )

    def _of_present_modules(self, plan: dict[str, Any] | None) -> dict[str, Any]:
        # The library expects every rule to meet a parameter, and which modules a model has depends on these fields.
        if self.bitnet_packed:
            return {}  # and has the packed weights whole
        absent = [] if self.use_qk_norm else ["layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"]
        if not self.moe_layers:
            absent += ["layers.*.mlp.gate", "layers.*.mlp.experts"]
        elif self.experts_quantization:  # whose matrices are no longer of experts, one by one
            absent.append("layers.*.mlp.experts")
        if not self.moe_layers or not self.shared_expert_intermediate_size:
            absent.append("layers.*.mlp.shared_expert")
        if len(self.moe_layers) == self.num_hidden_layers:
            absent += [f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")]
        if self.gated_mlp:
            absent.append("layers.*.mlp.experts.up_proj")
        else:
            absent += [f"layers.*.mlp.{name}_proj" for name in ("gate", "shared_expert.gate", "experts.gate_up")]
        return {
            rule: style
            for rule, style in (plan or {}).items()
            if not any(rule == module or rule.startswith(f"{module}.") for module in absent)
        }


if __name__.startswith("transformers_modules."):  # as code that came with a model, where mhmoe may not be installed
    # `transformers serve` looks in transformers for the class that a config names, before a model's code is loaded. It
    # is set on the module's class, since transformers, while it is imported, puts another module in its own place.
    for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        if not hasattr(transformers, f"MHMoEFor{task}"):
            setattr(type(transformers), f"MHMoEFor{task}", getattr(transformers, f"AutoModelFor{task}"))

# else `help` would show Llama's, whose defaults are others
MHMoEConfig.__init__.__doc__ = "The fields are Llama's and those that the class describes."

__all__ = ["ROUTER_TYPES", "MHMoEConfig", "RouterType"]
