"""
The dense families that convert: what each config says, in the words of MHMoEConfig. All else is refused by name. An
encoder's twin inherits its config whole, so of an encoder nothing needs to be said here.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mhmoe.configuration.costs import IMPLIED_FIELDS
from mhmoe.encoders.families import dense_model_types
from mhmoe.errors import UserError, one_line


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        carried: fields that MHMoEConfig has too, with the same meaning, beside those in `CARRIED`.
        absorbed: fields that the family's config class turns into carried ones.
    """

    carried: frozenset[str] = frozenset()
    absorbed: frozenset[str] = frozenset()


WINDOWS = frozenset({"sliding_window", "layer_types"})
BIASES = frozenset({"attention_bias", "mlp_bias"})
QWEN_WINDOWS = frozenset({"use_sliding_window", "max_window_layers"})
KNOWN = {  # by model_type
    "llama": Family(BIASES),
    "mistral": Family(frozenset({"sliding_window"})),
    "ministral": Family(WINDOWS),
    "qwen2": Family(WINDOWS, QWEN_WINDOWS),
    "qwen3": Family(WINDOWS | {"attention_bias"}, QWEN_WINDOWS),
    "smollm3": Family(
        WINDOWS | BIASES | {"no_rope_layers"},
        frozenset({"use_sliding_window", "no_rope_layer_interval"}),
    ),
    "cwm": Family(WINDOWS | {"mlp_bias"}),
    "internlm3": Family(BIASES, frozenset({"qkv_bias", "bias"})),
}
FAMILIES = {model_type: family for model_type, family in KNOWN.items() if model_type in CONFIG_MAPPING}
ENCODERS = [model_type for model_type in dense_model_types() if model_type in CONFIG_MAPPING]

DESCRIBES_THE_SOURCE = {"architectures", "transformers_version"}
# a tuple of outputs, which transformers' own models cannot make from their config
FORM_OF_OUTPUTS = {"return_dict"}
CARRIED = {field.name for field in dataclasses.fields(PreTrainedConfig)} - DESCRIBES_THE_SOURCE - FORM_OF_OUTPUTS | {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
}
ABSORBED = {"rope_theta", "rope_scaling", "torch_dtype"}
ROPE_PARAMETERS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "finetuned",  # says where a YaRN model comes from
}
# Nothing in the model, dense or MH-MoE, depends on these.
IRRELEVANT = {
    *DESCRIBES_THE_SOURCE,
    *FORM_OF_OUTPUTS,
    *GenerationConfig().to_dict(),
    "model_type",
    "name_or_path",
    "tokenizer_class",
    "is_llama_config",
    "max_sequence_length",
    "max_window_layers",  # where no window of Qwen's asks for it
    "pretraining_tp",
    "attn_implementation",
    "auto_map",  # code of its own, which a family of transformers does not need
    "transformers.js_config",
    "unsloth_fixed",
    # fields of all models in versions before 5
    "add_cross_attention",
    "cross_attention_hidden_size",
    "finetuning_task",
    "is_decoder",
    "prefix",
    "pruned_heads",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "torchscript",
    "use_bfloat16",
}


# private ones, special tokens of the tokenizer, versions of programs, how attention is computed
IRRELEVANT_NAME = re.compile(r"^_|_token(_ids?)?$|_version$|^use_flash_att|^flash_att")
NEUTRAL_AT_ONE = re.compile(r"_(multiplier|scale|scaling|factor)$")


def read_config(file: Path, values: dict) -> PreTrainedConfig:
    """
    The config that `values`, the JSON in `file`, describe.

    Raises:
        UserError: the family is not converted, or a field asks for what MH-MoE does not model, or is not valid.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in (*FAMILIES, *ENCODERS):
        known = ", ".join((*FAMILIES, *ENCODERS))
        raise UserError(f"{file}: model_type={model_type!r} is not converted; the source must be one of {known}")
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{file}: quantization_config is set; save the model dequantised (model.dequantize()) and convert that"
        )
    if model_type in FAMILIES and (unmodelled := _unmodelled(FAMILIES[model_type], values)):
        raise UserError(
            f"{file}: MH-MoE does not model {', '.join(unmodelled)}; remove what a {model_type} model does not use"
        )
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: not a valid {config_class.__name__} ({one_line(error)})") from error
    if model_type == "smollm3" and "sliding_attention" in config.layer_types and not config.use_sliding_window:
        raise UserError(f"{file}: layer_types has sliding layers, but use_sliding_window=False; make them agree")
    return config


def carried_fields(config: PreTrainedConfig) -> dict:
    """The fields of an MHMoEConfig with the embeddings, attention and dense FFNs of `config`, one of `FAMILIES`."""
    values = config.to_dict()
    fields = {name: values[name] for name in CARRIED | FAMILIES[config.model_type].carried if name in values}
    if config.model_type == "smollm3":
        fields["no_rope_layers"] = config.no_rope_layers[: config.num_hidden_layers]  # which may have more
    return fields | IMPLIED_FIELDS.get(config.model_type, {})


def _unmodelled(family: Family, values: dict) -> list[str]:
    """What of `values` is neither known nor switched off."""
    known = CARRIED | ABSORBED | IRRELEVANT | family.carried | family.absorbed
    unmodelled = {
        name: value
        for name, value in values.items()
        if name not in known and not IRRELEVANT_NAME.search(name) and not _is_off(name, value)
    }
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            unmodelled[name] = rope
            continue
        for key, value in rope.items():
            if key not in ROPE_PARAMETERS and not _is_off(key, value):
                unmodelled[f"{name}.{key}"] = value
    return [f"{name}={short_repr(value)}" for name, value in unmodelled.items()]


def _is_off(name: str, value: object) -> bool:
    if name == "is_causal":
        return value is not False
    if name == "layer_types" and isinstance(value, list):  # of a family without windows
        return all(kind == "full_attention" for kind in value)
    neutral = 1 if NEUTRAL_AT_ONE.search(name) else 0  # as a factor, and as anything else
    return value is None or value is False or value in ("", [], {}) or (value == neutral and value is not True)
