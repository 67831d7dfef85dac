"""MH-MoE for transformers. This file travels to the Hub: it imports only torch, transformers and its siblings.

Shapes: B sequences, T tokens, d hidden size, h MoE heads, E experts, k experts per sub-token, i expert inner size.
S = B * T * h sub-tokens of d/h numbers; the head index runs fastest. With a `moe_latent_size` l they have l/h.
P1 is arXiv 2404.15045, P2 is arXiv 2411.16205.
"""

import os
from functools import wraps

import torch
from torch import distributed, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.dots1.modeling_dots1 import Dots1Model
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralPreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder

from .auto_tables import register_names
from .bias_balancing import biased_routers, count_loads, update_router_biases
from .bitnet import BACKENDS as BITNET_BACKENDS
from .bitnet import packed_copy, refuse_adapters
from .configuration_mhmoe import MHMoEConfig
from .layer import MHMoEResidualBlock, MHMoESparseMoeBlock, experts_implementation, start_weights
from .load_balancing import by_head, load_balancing_loss, padding_mask, z_loss
from .quantization import dequantize_experts, quantize_experts
from .routers import MHMoETopKRouter
from .variants import make_linear_layers, make_mlp
from .zero_merge import warn_if_cut_off


logger = logging.get_logger(__name__)

# what a saved config says about the code beside it, so that every Auto class finds its own model there
AUTO_MAP = {
    "AutoConfig": "configuration_mhmoe.MHMoEConfig",
    "AutoModel": "modeling_mhmoe.MHMoEModel",
    "AutoModelForCausalLM": "modeling_mhmoe.MHMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mhmoe.MHMoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mhmoe.MHMoEForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mhmoe.MHMoEForQuestionAnswering",
}


def without_rotation(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of attention without positions: a rotation by nothing, which keeps every bit."""
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


class MHMoEAttention(Qwen3Attention):
    """
    Qwen3's attention, a window for some layers included, whose norms, biases and rotation are up to the config. The
    forward is Qwen3's own, whose source vLLM reads.
    """

    def __init__(self, config: MHMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # ty: ignore[invalid-argument-type]: all that it reads is Llama's too
        if config.no_rope_layers is not None and not config.no_rope_layers[layer_idx]:
            self.register_forward_pre_hook(without_rotation, with_kwargs=True)
        if not config.use_qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.attention_out_bias != config.attention_bias:
            self.o_proj = nn.Linear(
                self.o_proj.in_features, self.o_proj.out_features, bias=bool(config.attention_out_bias)
            )


class MHMoEDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MHMoEConfig, layer_idx: int):
        # not Llama's own __init__, which would build a dense FFN to throw away
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MHMoEAttention(config, layer_idx)
        block = MHMoEResidualBlock if config.sub_token_residual else MHMoESparseMoeBlock
        self.mlp = block(config) if layer_idx in config.moe_layers else make_mlp(config, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        make_linear_layers(self, config)


class MHMoEPreTrainedModel(MixtralPreTrainedModel):
    config: MHMoEConfig  # ty: ignore[incompatible-attribute-override]: which has what Mixtral's code reads
    _no_split_modules = ["MHMoEDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MHMoETopKRouter, index=0),
        "hidden_states": MHMoEDecoderLayer,
        "attentions": MHMoEAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        start_weights(module, self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library looks for `@use_experts_implementation` in this file, and it is in `experts`

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if self.config.use_bitnet and requested_experts not in (None, *BITNET_BACKENDS):
            raise ValueError(
                f"experts_implementation={requested_experts!r} rounds nothing between an expert's two products, as "
                f"use_bitnet=True needs; choose one of {', '.join(BITNET_BACKENDS)}."
            )
        requested_experts = experts_implementation(requested_experts, [self.config], self.config.dtype)
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; a `quantization_config` is for the experts too, or a warning says that it is not."""
        loaded = super().from_pretrained(*args, **kwargs)
        quantize_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def dequantize(self, *args, **kwargs):
        """As in transformers; the experts too."""
        restored = super().dequantize(*args, **kwargs)
        dequantize_experts(self)
        return restored

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers; the folder also loads, with any of the Auto classes below, where `mhmoe` is absent."""
        self.config.auto_map = dict(AUTO_MAP)
        model_class = type(self)
        if model_class.__name__.startswith("FSDP"):
            # FSDP2 gives the model a class of torch's module, which the library would take for the model's code
            model_class.__name__, model_class.__module__ = model_class.__name__.removeprefix("FSDP"), __name__
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_packed(self, save_directory: str | os.PathLike, **kwargs):
        """
        [`save_pretrained`] of a model trained with `use_bitnet`, with 2 bits for each ternary weight. The folder loads
        with `from_pretrained`, to a model with the same outputs that cannot be trained.

        Raises:
            ValueError: the config says that there is nothing to pack.
        """
        packed_copy(self).save_pretrained(save_directory, **kwargs)

    def update_router_biases(self):
        """
        DeepSeek-V3's balancing, where there is a `router_bias_update_rate`: to be called after each optimizer step, on
        every process. It goes by the loads of all training forwards since the last call, of all processes.
        """
        update_router_biases(self, self.config.router_bias_update_rate)


def return_tensors_alone(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of the base model: a graph that torch.export makes returns no cache unless it is asked to."""
    if torch.compiler.is_exporting() and kwargs.get("use_cache") is None:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


class MHMoEModel(MHMoEPreTrainedModel):
    def __init__(self, config: MHMoEConfig):
        server = config._attn_implementation
        if server in ("vllm", "sglang") and not getattr(config, "served_by_mhmoe", False):
            raise ValueError(
                f"{server}'s own Transformers backend gives an expert whole tokens, where it takes sub-tokens: serve "
                "the model with vLLM, mhmoe installed beside it and --model-impl left out, or with `mhmoe serve`."
            )
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MHMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (config.layer_types or ())  # which Dots1's forward may read
        self.merge_layers_seen = False
        self.register_forward_pre_hook(return_tensors_alone, with_kwargs=True)
        self.register_forward_pre_hook(warn_if_cut_off)
        if config.use_bitnet:
            self.register_forward_pre_hook(refuse_adapters)
        if config.router_bias_update_rate:
            self.register_forward_hook(count_loads, with_kwargs=True)
        self.post_init()

    @property
    def moe_blocks(self) -> list[MHMoESparseMoeBlock]:
        """The MH-MoE layers."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MHMoESparseMoeBlock)]

    @wraps(Dots1Model.forward)
    @can_return_tuple
    def forward(self, *args, **kwargs):  # ty: ignore[incompatible-mutable-override]: the decorators hide its types
        # Mixtral's, but with a mask for each kind of layer that there is. Only this is taken from Dots1: its classes
        # also keep some parameters in float32.
        outputs = Dots1Model.forward(self, *args, **kwargs, return_dict=True)
        if outputs.get("router_logits"):
            outputs["router_logits"] = by_head(outputs["router_logits"], self.config.num_moe_heads)
        return outputs


def warn_of_other_losses(model: MHMoEPreTrainedModel, args: tuple, output) -> None:
    """A forward hook, for tools that put a forward of their own in the place of the model's, as TRL does."""
    if getattr(output, "aux_loss", None) is None or isinstance(output, MoeCausalLMOutputWithPast):
        return
    config = model.config
    logger.warning_once(
        f"{type(output).__name__} is not this model's output: its aux_loss is that of softmax routers for shared "
        f"experts, without private_experts={config.private_experts}, scoring_func={config.scoring_func!r}, "
        f"router_z_loss_coef={config.router_z_loss_coef:g} and the routers' biases. Leave it out with "
        "router_aux_loss_coef=0.0, or train with transformers' Trainer."
    )


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Of (B, T, d) the last so many tokens, all for 0, or those of positions (n,) or (B, n), or of a mask (B, T)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


class MHMoEForCausalLM(MHMoEPreTrainedModel, MixtralForCausalLM):
    def __init__(self, config: MHMoEConfig):
        # not Mixtral's own __init__, which would build its model to throw it away
        MHMoEPreTrainedModel.__init__(self, config)
        self.model = MHMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if (
            config.scoring_func != "softmax"
            or config.router_z_loss_coef
            or config.router_bias_update_rate
            or config.private_experts
        ):
            self.register_forward_hook(warn_of_other_losses)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Arguments and outputs are those of [`MixtralForCausalLM`], the cache among them, whose name is up to the
        version of transformers. The differences: `router_logits` has a row for every sub-token, as `num_moe_heads`
        plain sparse layers would have in place of each MH-MoE layer: head by head, tensors of
        `(batch * tokens, num_experts)`. Padding does not count in the load balancing loss and the z-loss; and these
        keep their weights under gradient accumulation and data parallelism, since they are scaled by this forward's
        share of the step's tokens wherever the cross entropy is.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = self.loss_function(logits, labels, self.vocab_size, **kwargs) if labels is not None else None

        aux_loss = None
        router_logits = outputs.get("router_logits")
        if output_router_logits and router_logits:
            # `num_items_in_batch` counts the targets of a whole step, over its micro-batches and processes
            num_items_in_batch = kwargs.get("num_items_in_batch") if labels is not None else None
            mask = padding_mask(attention_mask, tokens=outputs.last_hidden_state.shape[1])
            biases = None  # only where there are some is the model searched for them
            if self.config.router_bias_update_rate:
                biases = [bias for router in biased_routers(self) for bias in router.biases_by_head()]
            aux_loss = load_balancing_loss(
                router_logits,
                self.config.num_experts_per_tok,
                mask,
                over_processes=num_items_in_batch is not None
                and self.training
                and distributed.is_available()
                and distributed.is_initialized(),
                scoring_func=self.config.scoring_func,
                biases=biases,
                groups=self.config.num_moe_heads if self.config.private_experts else 1,
            )
            if loss is not None and labels is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    targets = kwargs.get("shift_labels")
                    targets = labels[..., 1:] if targets is None else targets
                    share = targets.ne(-100).sum().to(loss.device) / num_items_in_batch
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
                if self.config.router_z_loss_coef:
                    router_z_loss = z_loss(router_logits, mask)
                    loss = loss + self.config.router_z_loss_coef * share * router_z_loss.to(loss.device)

        others = {name: output for name, output in outputs.items() if name != "last_hidden_state"}
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)


class MHMoEForSequenceClassification(GenericForSequenceClassification, MHMoEPreTrainedModel):
    def __init__(self, config: MHMoEConfig):
        # not the generic __init__, whose AutoModel cannot build the base model where this file is remote code
        MHMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MHMoEModel(config)
        # ty: ignore[invalid-argument-type]: no None
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MHMoEForTokenClassification(GenericForTokenClassification, MHMoEPreTrainedModel):
    def __init__(self, config: MHMoEConfig):
        # not the generic __init__, whose AutoModel cannot build the base model where this file is remote code
        MHMoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MHMoEModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # ty: ignore[invalid-argument-type]: no None
        self.post_init()


class MHMoEForQuestionAnswering(GenericForQuestionAnswering, MHMoEPreTrainedModel):
    def __init__(self, config: MHMoEConfig):
        # not the generic __init__, whose AutoModel cannot build the base model where this file is remote code
        MHMoEPreTrainedModel.__init__(self, config)
        self.model = MHMoEModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


register_names()

__all__ = [
    "MHMoEForCausalLM",
    "MHMoEForQuestionAnswering",
    "MHMoEForSequenceClassification",
    "MHMoEForTokenClassification",
    "MHMoEModel",
    "MHMoEPreTrainedModel",
]
