"""
Configurations of encoders with MH-MoE layers: `MHMoEViTConfig`, `MHMoEBertConfig`, ..., one for every config of the
families in `families.py`, made when it is asked for.

This file travels to the Hub: it imports only transformers and its siblings.
"""

import os
from collections.abc import Callable
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from .configuration_mhmoe import MHMoEConfig
from .families import PREFIX, TYPE_PREFIX, family_of


# P1's layer, whose experts have P2's inner size for the multiply-adds of a dense FFN of 3072 at d=768
DEFAULTS = {"num_moe_heads": 4, "num_experts": 8, "moe_intermediate_size": 1152, "gated_mlp": None}
MOE_FIELDS = (
    "num_moe_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_latent_size",
    "private_experts",
    "router_input",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "gated_mlp",
    "head_layer_depth",
    "merge_layer_depth",
    "head_merge_bias",
    "head_merge_init",
    "token_split",
    "conv_kernel_size",
    "conv_stride",
    "sub_token_residual",
    "router_type",
    "router_dim",
    "scoring_func",
    "router_temperature",
)
LOSS_FIELDS = ("router_aux_loss_coef", "router_z_loss_coef", "output_router_logits")
IGNORED_AT_INFERENCE = ["aux_loss", "router_logits"]


def _fields_of_mhmoe(name: str, names: tuple[str, ...]) -> Any:
    """A dataclass with these fields of MHMoEConfig, to inherit from."""
    of_decoders = {field.name: field for field in fields(MHMoEConfig)}
    rows = []
    for field_name in names:
        field = of_decoders[field_name]
        default = DEFAULTS.get(field_name, field.default)
        assert default is not MISSING
        # ty: ignore[unsupported-operator]: types, not their names
        rows.append((field_name, field.type | None if default is None else field.type, default))
    return make_dataclass(name, rows, kw_only=True, init=False, repr=False, eq=False)


MoEFields = _fields_of_mhmoe("MoEFields", (*MOE_FIELDS, *LOSS_FIELDS))
LossFields = _fields_of_mhmoe("LossFields", LOSS_FIELDS)
Config = PreTrainedConfig if TYPE_CHECKING else object  # what the classes below are mixed into


class MHMoEEncoderConfig(MoEFields):
    r"""
    The fields that a config of an encoder gains. They are those of [`MHMoEConfig`], with these differences:

    Args:
        num_moe_heads (`int`, *optional*, defaults to 4): as in P1.
        num_experts (`int`, *optional*, defaults to 8): as in P1.
        moe_intermediate_size (`int`, *optional*, defaults to 1152):
            Inner size of one routed expert; the default has, at a hidden size of 768 and without a shared expert, the
            multiply-adds of the dense FFN.
        shared_expert_intermediate_size (`int`, *optional*, defaults to 0):
            Inner size of the expert that every whole token passes, which is an FFN of the family itself, with its own
            parameters' names; 0 for none.
        gated_mlp (`bool`, *optional*):
            Whether routed experts are gated; by default as the family's own FFN.

    Raises:
        ValueError: a field's value is impossible, alone or beside another's; the message names field and value.
    """

    def __post_init__(self, **kwargs):
        self.mlp_only_layers = [] if self.mlp_only_layers is None else self.mlp_only_layers
        super().__post_init__(**kwargs)
        if self.gated_mlp is None:
            self.gated_mlp = ffn_is_gated(self)
        _ = self.moe_config  # which checks the fields
        shared, own = self.shared_expert_intermediate_size, inner_size(self)
        if shared not in (0, own) and not hasattr(self, "intermediate_size"):
            raise ValueError(f"shared_expert_intermediate_size={shared} must be 0 or {own}, which mlp_ratio gives.")

    @property
    def num_routed_experts(self) -> int:
        """Routed experts in each MH-MoE layer, of all heads together."""
        return self.moe_config.num_routed_experts

    @property
    def moe_config(self) -> MHMoEConfig:
        """What the MH-MoE layers of this encoder are made from: a decoder's config with layers like them."""
        return as_decoder(self, **{name: getattr(self, name) for name in MOE_FIELDS})


class MHMoETowersConfig(LossFields):
    r"""
    The fields that a config of several encoders gains: those of the losses. What the MH-MoE layers of an encoder are
    is said in its own config, such as `text_config`.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, config_class in self.towers().items():
            own = getattr(self, name)
            if not isinstance(own, config_class):  # the family's code has made a dense config of it
                values = {key: value for key, value in own.to_dict().items() if key != "model_type"}
                setattr(self, name, config_class(**values))

    @classmethod
    def towers(cls) -> dict[str, type]:
        """The configs' classes, by the fields that hold them; without the model's own, where it is of an encoder."""
        return {name: made for name, made in cls.sub_configs.items() if issubclass(made, MHMoEEncoderConfig)}


def save_code(folder: str | os.PathLike, *classes: type) -> None:
    """
    Puts the code of `classes`, and what it imports, into `folder`. Last the config of the layer, in whose place this
    package has a re-export.
    """
    for copied in (*classes, MHMoEConfig):
        custom_object_save(copied, folder)


class _Saved(Config):
    """What saves a config together with its code, so that it loads where `mhmoe` is not installed."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        self.auto_map = {"AutoConfig": f"{__name__.split('.')[-1]}.{type(self).__name__}"} | (
            getattr(self, "auto_map", None) or {}
        )
        super().save_pretrained(save_directory, **kwargs)
        save_code(save_directory, type(self))
        if push_to_hub:  # once the code is there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


def make_config(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The twin of a config of one of the families, a class of this module."""
    family = family_of(dense)
    assert family is not None
    namespace: dict[str, Any] = {
        "model_type": TYPE_PREFIX + dense.model_type,
        "keys_to_ignore_at_inference": [*getattr(dense, "keys_to_ignore_at_inference", ()), *IGNORED_AT_INFERENCE],
    }
    if dense.sub_configs:
        sub_configs = {
            name: config_class(PREFIX + of.__name__) if of.model_type in family.towers else of
            for name, of in dense.sub_configs.items()
        }
        # the newer versions of transformers make the first from the second
        namespace["sub_configs_defaults" if hasattr(dense, "sub_configs_defaults") else "sub_configs"] = sub_configs
    several = (MHMoETowersConfig,) if dense.sub_configs else ()
    own = (MHMoEEncoderConfig,) if hasattr(dense, "num_hidden_layers") or not several else ()
    return strict(make_class(dense, (_Saved, *several, *own, dense), namespace, __name__))


def make_class(dense: type, bases: tuple[type, ...], namespace: dict[str, Any], module: str) -> Any:
    """The class with the twin's name, which pickles and saves as one that is written in `module`."""
    name = PREFIX + dense.__name__
    doc = f"The MH-MoE twin of transformers' [`{dense.__name__}`], from which it inherits."
    return type(name, bases, {"__module__": module, "__qualname__": name, "__doc__": doc, **namespace})


def twin_class(name: str, kind: type, make: Callable[[Any], type], module: dict[str, Any]) -> Any:
    """
    The twin of this name, a class of `module`, the globals of where it stands; made where it is not there yet.

    Raises:
        AttributeError: no family has such a class, of the `kind` that is asked for.
    """
    if name not in module:
        dense = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
        if not isinstance(dense, type) or not issubclass(dense, kind) or family_of(dense) is None:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        module[name] = make(dense)
    return module[name]


# What is asked of a family's own FFN has other names in some.


def activation(config: PreTrainedConfig) -> str:
    """Of the FFNs."""
    if getattr(config, "use_swiglu_ffn", False):  # DINOv2's
        return "silu"
    return getattr(config, "hidden_activation", None) or config.hidden_act


def ffn_is_gated(config: PreTrainedConfig) -> bool:
    gated = any(getattr(config, name, False) for name in ("use_swiglu_ffn", "use_gated_mlp"))  # DINOv2's, DINOv3's
    return gated or config.model_type.endswith("modernbert")


def ffn_has_bias(config: PreTrainedConfig) -> bool:
    return getattr(config, "mlp_bias", True)


def inner_size(config: PreTrainedConfig) -> int:
    """Of a dense FFN."""
    if (size := getattr(config, "intermediate_size", None)) is not None:
        return size
    size = int(config.hidden_size * config.mlp_ratio)  # DINOv2's
    return (int(size * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else size


def as_decoder(config: PreTrainedConfig, **moe) -> MHMoEConfig:
    """A decoder's config with the layers of an encoder: `moe` says what its MH-MoE layers are; without it, none is."""
    dense: dict[str, Any] = {"mlp_only_layers": list(range(config.num_hidden_layers)), "num_moe_heads": 1}
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": inner_size(config),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_act": activation(config),
        "gated_mlp": ffn_is_gated(config),
        "mlp_bias": ffn_has_bias(config),
        "initializer_range": getattr(config, "initializer_range", 0.02),
        **(moe or dense),
    }
    return MHMoEConfig(**fields)


def config_class(name: str) -> type[PreTrainedConfig]:
    """The config class of this name, such as "MHMoEViTConfig", made when it is first asked for."""
    return twin_class(name, PreTrainedConfig, make_config, globals())


__getattr__ = config_class
