"""MH-MoE configuration. This file travels to the Hub: it imports only transformers and its own dependencies."""

from collections.abc import Callable, Mapping
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
    What a config and its costs know of a kind of router; its module is in `modeling_mhmoe/routers.py`. Another kind
    is a subclass, made known by `register_router`.

    Attributes:
        fields: fields of the config that are for this kind of router, which others refuse.
        rows_by_head: whether it can have rows of its own for each head, as `private_experts` and a `router_input` that
            all sub-tokens of a token share need.
    """

    fields: tuple[str, ...] = ()
    rows_by_head: bool = False

    def check(self, config: "MHMoEConfig") -> None:
        """Raise a ValueError, naming field and value, if `config` asks for what this router cannot do."""

    def rows(self, config: "MHMoEConfig") -> int:
        """Rows of the router's weight: one for each expert, or in each head."""
        return config.num_experts * (config.num_moe_heads if config.has_rows_by_head else 1)

    def input_size(self, config: "MHMoEConfig") -> int:
        """Numbers that the router sees of a sub-token, or of the token that it is from."""
        sizes = {"token": config.hidden_size, "latent": config.latent_size, "sub_token": config.sub_token_size}
        return sizes[config.router_input]

    def width(self, config: "MHMoEConfig") -> int:
        """Numbers that an expert's row in the router has."""
        return self.input_size(config)

    def parameters(self, config: "MHMoEConfig") -> int:
        """Parameters of the router of one layer."""
        return self.rows(config) * self.width(config)

    def multiply_adds(self, config: "MHMoEConfig") -> int:
        """Multiply-adds of the router of one layer for one sub-token."""
        return config.num_experts * self.width(config)


class SoftmaxRouterType(RouterType):
    """The router of P2, and of all that later papers add to it."""

    rows_by_head = True


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
        projection = self.width(config) * config.sub_token_size
        return super().multiply_adds(config) + projection


class ExpertsType:
    """
    What a config and its costs know of a kind of routed experts, here P2's of gate, up and down matrix; its module is
    in `modeling_mhmoe/experts.py`. Another kind is a subclass, made known by `register_experts`.

    Attributes:
        fields: fields of the config that are for this kind of experts, which others refuse.
        matrices: matrices of an expert, each of a sub-token's numbers by `moe_intermediate_size`, with which parity
            solves for sizes.
        parts: parameters of the module that hold an expert after the other, which parallel plans split; with none,
            no plan splits the experts.
    """

    fields: tuple[str, ...] = ()
    matrices: int = 3
    parts: tuple[str, ...] = ("gate_up_proj", "down_proj")

    def check(self, config: "MHMoEConfig") -> None:
        """Raise a ValueError, naming field and value, if `config` asks for what these experts cannot do."""

    def parameters(self, config: "MHMoEConfig") -> int:
        """Parameters of one expert."""
        return self.matrices * config.sub_token_size * config.moe_intermediate_size

    def multiply_adds(self, config: "MHMoEConfig") -> int:
        """Multiply-adds of one expert for one sub-token."""
        return self.matrices * config.sub_token_size * config.moe_intermediate_size


class TwoMatrixExpertsType(ExpertsType):
    """P1's experts, of up and down matrix."""

    matrices = 2
    parts = ("up_proj", "down_proj")


ROUTER_TYPES: dict[str, RouterType] = {"softmax": SoftmaxRouterType(), "xmoe": XMoERouterType()}  # by `router_type`
EXPERTS_TYPES: dict[str, ExpertsType] = {"gated": ExpertsType(), "two_matrix": TwoMatrixExpertsType()}

# fields that a saved config has only where they are set, since checkpoints are older than they
LEFT_OUT_BY_DEFAULT = ("experts_type", "moe_latent_size", "private_experts", "router_input")


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
            Sub-tokens that every token is split into, h in the papers; divides `hidden_size`, or `moe_latent_size`. 1
            is a plain sparse MoE: no split, and no head and merge layers unless their depths or `moe_latent_size` ask
            for them.
        num_experts (`int`, *optional*, defaults to 40):
            Routed experts in each MH-MoE layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that each **sub-token** is routed to, so a token reaches up to `num_moe_heads` times as many.
        moe_intermediate_size (`int`, *optional*, defaults to 768):
            Inner size of one routed expert, whose input and output have `moe_latent_size / num_moe_heads` numbers.
        moe_latent_size (`int`, *optional*):
            Numbers of a token between head and merge layer, l in LatentMoE (arXiv 2601.18089), whose down and up
            projections these then are; `num_moe_heads` divides it. By default `hidden_size`.
        private_experts (`bool`, *optional*, defaults to `False`):
            Whether each head has a router and `num_experts` experts of its own (MH-LatentMoE, arXiv 2602.04870);
            otherwise all heads share them, as in P1 and P2.
        router_input (`str`, *optional*, defaults to `"sub_token"`):
            What the router sees: "sub_token", as in P1 and P2; "token", the layer's input, as in LatentMoE; or
            "latent", the head layer's whole output. From the last two it makes logits for each head, by rows of its
            own.
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
        experts_type (`str`, *optional*):
            Kind of the routed experts: "gated", "two_matrix", or one that `register_experts` made known; by default
            as `gated_mlp` says.
        head_layer_depth, merge_layer_depth (`int`, *optional*):
            Linear layers in the head and in the merge layer, 0 to 3 with ReLU between (P1 table 7); 0 leaves it out.
            By default 1, and 0 where `num_moe_heads` is 1 and there is no `moe_latent_size`; P2's ablation adds them.
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
    moe_latent_size: int | None = None
    private_experts: bool = False
    router_input: Literal["sub_token", "token", "latent"] = "sub_token"
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    router_aux_loss_coef: float | int = 0.01
    output_router_logits: bool = False
    gated_mlp: bool = True
    experts_type: str | None = None
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
    def latent_size(self) -> int:
        """Numbers of a token between head and merge layer."""
        return self.moe_latent_size or self.hidden_size

    @property
    def sub_token_size(self) -> int:
        """Numbers of a sub-token."""
        return self.latent_size // self.num_moe_heads

    @property
    def num_routed_experts(self) -> int:
        """Routed experts in each MH-MoE layer, of all heads together."""
        return self.num_experts * (self.num_moe_heads if self.private_experts else 1)

    @property
    def has_rows_by_head(self) -> bool:
        """Whether the router has rows of its own for each head."""
        return self.private_experts or self.router_input != "sub_token"

    @property
    def layer_depths(self) -> tuple[int, int]:
        """Linear layers in the head and in the merge layer."""
        default = 1 if self.num_moe_heads > 1 or self.moe_latent_size is not None else 0
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
    def experts_kind(self) -> str:
        """`experts_type`, or what follows from `gated_mlp`."""
        return self.experts_type or ("gated" if self.gated_mlp else "two_matrix")

    @property
    def expert(self) -> ExpertsType:
        """What is known of the kind of the routed experts."""
        return EXPERTS_TYPES[self.experts_kind]

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a dense FFN or shared expert: gate, up and down, or the last two alone."""
        return 3 if self.gated_mlp else 2

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        return {
            name: value
            for name, value in fields.items()
            if name not in LEFT_OUT_BY_DEFAULT or value != getattr(type(self), name)
        }

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
            "moe_latent_size",
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
            ("hidden_size" if self.moe_latent_size is None else "moe_latent_size", "num_moe_heads"),
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
        self._validate_family()
        self._validate_kind("router_type", self.router_type, ROUTER_TYPES, "register_router")
        self._validate_kind("experts_type", self.experts_kind, EXPERTS_TYPES, "register_experts")
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

    def _validate_family(self):
        """What the papers after P2 add."""
        if self.moe_latent_size is not None and 0 in self.layer_depths:
            field = ("head_layer_depth", "merge_layer_depth")[self.layer_depths.index(0)]
            raise ValueError(
                f"{field}=0 leaves out a layer that projects to or from moe_latent_size={self.moe_latent_size}; leave "
                "one of the two fields out."
            )
        if self.moe_latent_size is not None and self.token_split == "conv1d":
            raise ValueError(
                f"moe_latent_size={self.moe_latent_size} is what a head layer makes, which token_split='conv1d' "
                "replaces; leave one out."
            )
        if self.private_experts and self.num_moe_heads == 1:
            raise ValueError("private_experts=True needs heads to have them, and num_moe_heads=1; leave one out.")
        if self.num_moe_heads == 1 and self.layer_depths[0] == 0 and self.router_input == "token":
            raise ValueError(
                "router_input='token' is what the router sees anyway with num_moe_heads=1 and no head layer; leave it "
                "out."
            )
        if self.num_moe_heads == 1 and self.router_input == "latent":
            raise ValueError(
                "router_input='latent' is what the router sees anyway with num_moe_heads=1; leave it out."
            )
        if self.has_rows_by_head and self.router_type in ROUTER_TYPES and not self.router.rows_by_head:
            field = "private_experts" if self.private_experts else "router_input"
            raise ValueError(
                f"{field}={getattr(self, field)!r} needs a router with rows for each head, and "
                f"router_type={self.router_type!r} has the same for all; leave one out."
            )

    def _validate_kind(self, of: str, kind: str, types: Mapping[str, RouterType | ExpertsType], register: str):
        if kind not in types:
            raise ValueError(
                f"{of}={kind!r} is not known; choose one of {', '.join(types)}, or make another known with {register}."
            )
        for field in {field for known in types.values() for field in known.fields}:
            takers = [name for name, known in types.items() if field in known.fields]
            value, default = getattr(self, field, None), getattr(type(self), field, None)
            if value != default and kind not in takers:
                raise ValueError(
                    f"{field}={value!r} is for {of}={' or '.join(map(repr, takers))}; set that too, or leave "
                    f"{field} out."
                )
        types[kind].check(self)

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
        elif self.experts_quantization or not self.expert.parts:  # the matrices are not of experts, one by one
            absent.append("layers.*.mlp.experts")
        if not self.moe_layers or not self.shared_expert_intermediate_size:
            absent.append("layers.*.mlp.shared_expert")
        if len(self.moe_layers) == self.num_hidden_layers:
            absent += [f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")]
        if not self.gated_mlp:
            absent += ["layers.*.mlp.gate_proj", "layers.*.mlp.shared_expert.gate_proj"]
        parts = {part for known in EXPERTS_TYPES.values() for part in known.parts}
        absent += [f"layers.*.mlp.experts.{part}" for part in parts.difference(self.expert.parts)]
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

__all__ = ["EXPERTS_TYPES", "ROUTER_TYPES", "ExpertsType", "MHMoEConfig", "RouterType"]
