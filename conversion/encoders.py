"""
Conversion of dense encoders: how a recipe for one differs from a decoder's. The tensors of the dense model keep their
names and their bytes, but for FFNs that a strategy takes apart; what is new stands beside them. A model may have
several encoders, as CLIP has, and each has sizes of its own.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME

import mhmoe
from mhmoe.configuration import Costs, MHMoEConfig
from mhmoe.encoders.configuration_mhmoe_encoders import as_decoder, inner_size, save_code
from mhmoe.encoders.costs import encoder_costs, encoders_of, on_meta
from mhmoe.encoders.families import PREFIX, auto_classes, family_of
from mhmoe.encoders.modeling_mhmoe_encoders import MHMoEEncoder, auto_map, stacks_of
from mhmoe.errors import UserError, one_line
from mhmoe.intake import PROCESSOR_FILES, TOKENIZER_FILES
from mhmoe.modeling_mhmoe.layer import MHMoESparseMoeBlock

from .checkpoint import BUFFER_DTYPES, DTYPES, DenseCheckpoint
from .families import ENCODERS
from .options import ConversionOptions
from .recipe import (
    CalibrationText,
    Recipe,
    check_family,
    check_size,
    chosen_dtype,
    chosen_sizes,
    own_options,
    reference_sizes,
)
from .sizes import Sizes
from .strategies import STRATEGIES, ConversionStrategy, StrategyOptions
from .strategies.strategy import FLOAT32, PROGRAM_BYTES
from .writer import PlannedTensor


# of an FFN, in any family: layer and tensor
FFN_TENSOR = re.compile(r"(?:^|\.)layers?\.(\d+)\.(?:mlp|intermediate\.dense|output\.dense)\.(.+)$")
GATED_PARTS = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
# which of these a tensor holds, one above the other, where it has another name
HELD = {"Wi.weight": ("gate_proj.weight", "up_proj.weight"), "Wo.weight": ("down_proj.weight",)}
PIPELINE_TAGS = {  # of the first Auto class that knows a model
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}


def recipe_for(checkpoint: DenseCheckpoint, options: ConversionOptions) -> Recipe:
    """
    Decide what `options` leave open, for a decoder or an encoder.

    Raises:
        UserError: the sizes do not fit, or options do not go together.
    """
    kind = EncoderRecipe if checkpoint.config.model_type in ENCODERS else Recipe
    return kind.resolve(checkpoint, options)


@dataclass(frozen=True)
class Encoder:
    """
    One encoder of a model, as a strategy sees a recipe.

    Attributes:
        config: a decoder's, with MH-MoE layers like those of this encoder.
        dense_config: one with the dense FFNs.
        ffn_shapes: of the new tensors in one layer.
        prefixes: where they stand in the model, by layer.
        number: of its first layer, counted over all encoders; so no two layers start alike.
    """

    options: ConversionOptions
    strategy_options: StrategyOptions
    config: MHMoEConfig
    dense_config: MHMoEConfig
    ffn_shapes: dict[str, tuple[int, ...]]
    prefixes: dict[int, str]
    number: int


@dataclass(frozen=True)
class EncoderRecipe(Recipe):
    """As for a decoder; `config` is that of the twin of the source's model class."""

    small_files = (*TOKENIZER_FILES, *PROCESSOR_FILES)
    generates = False

    @classmethod
    def resolve(cls, checkpoint: DenseCheckpoint, options: ConversionOptions) -> "EncoderRecipe":
        strategy = STRATEGIES[options.strategy]
        strategy_options = own_options(strategy, options)
        kind = checkpoint.config.model_type
        if strategy.needs_text:
            raise UserError(f"strategy {strategy.name} walks through decoders, and a {kind} is none; choose exact")
        if options.router_init != "random":
            raise UserError(f"--router-init {options.router_init} walks through decoders, and a {kind} is none")
        if texts := options.calibration_files:
            raise UserError(f"--calibration {texts[0]}: nothing learns from a text here; leave it out")
        check_family(strategy, options)
        config = _twin_config(checkpoint, options, strategy)
        recipe = cls(checkpoint, options, strategy, strategy_options, config)
        for encoder in recipe.encoders:
            strategy.check(encoder)  # ty: ignore[invalid-argument-type]: it has what a strategy looks at
        check_size(recipe.costs["mhmoe"].parameters, recipe.sizes)
        return recipe

    @cached_property
    def model_class(self) -> type[MHMoEEncoder]:
        """The twin of the source's."""
        return getattr(mhmoe, PREFIX + _dense_class(self.checkpoint).__name__)

    @cached_property
    def model(self) -> MHMoEEncoder:
        """Without memory."""
        try:
            return on_meta(self.model_class, self.config)
        except Exception as error:  # of a field that no check of the config knows
            file = self.checkpoint.folder / CONFIG_NAME
            raise UserError(f"{file}: no model can be built so ({one_line(error)}); get it again") from error

    @cached_property
    def encoders(self) -> list[Encoder]:
        """In the model's order."""
        names = {module: name for name, module in self.model.named_modules()}
        encoders, number = [], 0
        for stack, config in stacks_of(self.model):
            blocks = {
                layer: next(m for n, m in stack[layer].named_modules() if n.endswith(".moe"))
                for layer in range(len(stack))
            }
            shapes = {name: tuple(tensor.shape) for name, tensor in blocks[0].state_dict().items()}
            prefixes = {layer: names[block] for layer, block in blocks.items()}
            moe_config = config.moe_config
            encoders.append(
                Encoder(self.options, self.strategy_options, moe_config, as_decoder(config), shapes, prefixes, number)
            )
            number += len(stack)
        return encoders

    @cached_property
    def sizes(self) -> Sizes:
        """Of the MH-MoE layers; `None` where encoders differ."""
        configs = [config.moe_config for config in encoders_of(self.config).values()]
        found = {field.name: {getattr(config, field.name) for config in configs} for field in fields(Sizes)}
        sizes: dict[str, Any] = {name: values.pop() if len(values) == 1 else None for name, values in found.items()}
        return Sizes(**sizes)

    @cached_property
    def costs(self) -> dict[str, Costs]:
        dense = copy.deepcopy(self.config)
        for config in encoders_of(dense).values():
            config.mlp_only_layers = list(range(config.num_hidden_layers))
        return {"dense": encoder_costs(on_meta(self.model_class, dense)), "mhmoe": encoder_costs(self.model)}

    def reference(self) -> tuple[Sizes, Costs]:
        config = copy.deepcopy(self.config)
        for encoder in encoders_of(config).values():
            sizes = reference_sizes(self.options, inner_size(encoder))
            for name, value in asdict(sizes).items():
                setattr(encoder, name, value)
        return sizes, encoder_costs(on_meta(self.model_class, config))

    @property
    def depth_and_width(self) -> tuple[int, int]:
        configs = encoders_of(self.config).values()
        return sum(config.num_hidden_layers for config in configs), max(config.hidden_size for config in configs)

    @property
    def auto_class(self) -> str:
        """The most special that knows the model."""
        dense = self.model_class.dense
        knowing = [
            name
            for name, auto_class in auto_classes(modeling_auto).items()
            if dense.__name__ in _names(auto_class._model_mapping._model_mapping.get(dense.config_class.model_type))
        ]
        ranked = [name for name in PIPELINE_TAGS if name in knowing] or knowing
        return ranked[0] if ranked else self.model_class.__name__

    @property
    def pipeline_tag(self) -> str:
        tag = PIPELINE_TAGS.get(self.auto_class, "feature-extraction")
        of_pictures = self.model_class.dense.main_input_name == "pixel_values"
        return f"image-{tag}" if of_pictures and tag == "feature-extraction" else tag

    def peak_memory(self, stored_itemsize: int) -> int:
        """A layer is made whole, one tensor is written while the next is read."""
        made = [sum(torch.Size(shape).numel() for shape in encoder.ffn_shapes.values()) for encoder in self.encoders]
        stored = max(torch.Size(tensor.shape).numel() for tensor in self.checkpoint.tensors.values())
        return PROGRAM_BYTES + 2 * FLOAT32 * max(made) + 2 * stored_itemsize * stored

    def check_source(self) -> None:
        """
        Raises:
            UserError: tensors are missing or of another size, as transformers finds them.
        """
        folder = self.checkpoint.folder
        if not all(file.is_file() for file in self.checkpoint.weight_files):
            return  # on the Hub, of which only headers were fetched
        try:
            _, loading = self.model_class.dense.from_pretrained(folder, device_map="meta", output_loading_info=True)
        except Exception as error:  # many libraries have a part in it, each with exceptions of its own
            raise UserError(f"{folder}: cannot be loaded as its config says ({one_line(error, 300)})") from error
        if missing := sorted(map(str, loading["missing_keys"])):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{folder}: lacks tensors: {', '.join(missing[:3])}{more}; does config.json belong to them?"
            )

    def plan_tensors(self, text: CalibrationText | None) -> tuple[dict[str, PlannedTensor], Callable[[], dict]]:
        self.check_source()
        dtype = getattr(torch, str(self.config.dtype).removeprefix("torch."))
        source, as_stored = self.checkpoint, self.options.dtype == "auto"
        made = [MadeLayer(self.strategy(encoder, None), encoder, source) for encoder in self.encoders]  # ty: ignore[invalid-argument-type]
        planned = {}
        for name, stored in source.tensors.items():
            stored_dtype = (DTYPES | BUFFER_DTYPES).get(stored.dtype)
            if stored_dtype is None:
                raise UserError(f"{source.name}: tensor {name} is {stored.dtype}, which is not converted")
            kept_dtype = stored_dtype if as_stored or stored.dtype in BUFFER_DTYPES else dtype
            ffn = FFN_TENSOR.search(name)
            if ffn is None or self.strategy.keeps_ffns:
                planned[name] = PlannedTensor(stored.shape, kept_dtype, partial(source.load, name))
            elif self.sizes.shared_expert_intermediate_size:
                layer, part = int(ffn[1]), ffn[2]
                shape = made[0].fused_shape(part, stored.shape)
                planned[name] = PlannedTensor(shape, kept_dtype, partial(made[0].fused, layer, part))
        for layers, encoder in zip(made, self.encoders, strict=True):
            for layer, prefix in encoder.prefixes.items():
                for part, shape in encoder.ffn_shapes.items():
                    planned[f"{prefix}.{part}"] = PlannedTensor(shape, dtype, partial(layers.load, layer, part))
        return planned, dict

    def write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.config)
        config.auto_map = auto_map(type(config))
        save_code(folder, self.model_class, MHMoESparseMoeBlock)
        config.save_pretrained(folder)


class GatedFFN(Mapping[str, torch.Tensor]):
    """The FFN of one layer in a decoder's words."""

    def __init__(self, checkpoint: DenseCheckpoint, layer: int):
        self._checkpoint = checkpoint
        self._places = {}  # of each part: the tensor, which of those in it, of how many
        for name in checkpoint.tensors:
            ffn = FFN_TENSOR.search(name)
            if ffn is not None and int(ffn[1]) == layer:
                held = HELD.get(ffn[2], (ffn[2],))
                self._places |= {part: (name, place, len(held)) for place, part in enumerate(held)}

    def __getitem__(self, part: str) -> torch.Tensor:
        name, place, count = self._places[part]
        return self._checkpoint.load(name).chunk(count)[place]

    def __iter__(self) -> Iterator[str]:
        return iter(GATED_PARTS)

    def __len__(self) -> int:
        return len(GATED_PARTS)


class MadeLayer:
    """What a strategy makes of the layers of one encoder, a whole layer at a time, of which the last is kept."""

    def __init__(self, strategy: ConversionStrategy, encoder: Encoder, checkpoint: DenseCheckpoint):
        self._strategy, self._encoder, self._checkpoint = strategy, encoder, checkpoint
        self._layer, self._parts = -1, {}

    def load(self, layer: int, part: str) -> torch.Tensor:
        """The tensor `part` of a layer."""
        if layer != self._layer:
            ffn = GatedFFN(self._checkpoint, layer)
            # ty: ignore[invalid-argument-type]: it has what a strategy looks at
            self._parts = dict(self._strategy.layer(self._encoder.number + layer, ffn))
            self._layer = layer
        return self._parts[part]

    def fused(self, layer: int, part: str) -> torch.Tensor:
        """A tensor of the narrower FFN that is the shared expert, by its name in the family."""
        return torch.cat([self.load(layer, f"shared_expert.{held}") for held in HELD.get(part, (part,))])

    def fused_shape(self, part: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        width, held = self._encoder.config.shared_expert_intermediate_size, HELD.get(part, (part,))
        return (stored[0], width) if held == ("down_proj.weight",) else (len(held) * width, stored[1])


def _dense_class(checkpoint: DenseCheckpoint) -> type[PreTrainedModel]:
    """The source's, which its config names; the bare model where it names none."""
    config, file = checkpoint.config, checkpoint.folder / CONFIG_NAME
    bare = modeling_auto.MODEL_MAPPING_NAMES[config.model_type]
    name = (getattr(config, "architectures", None) or [bare])[0]
    try:
        dense = getattr(transformers, str(name), None)
    except ImportError:  # of a class that needs another library
        dense = None
    of_family = isinstance(dense, type) and issubclass(dense, PreTrainedModel) and family_of(dense) is not None
    if not of_family or dense.config_class is not type(config):
        raise UserError(
            f"{file}: architectures={one_line(config.architectures)} is no model of transformers' "
            f"{config.model_type}; name one, such as {bare}"
        )
    return dense


def _moe_fields(
    dense: PreTrainedConfig, options: ConversionOptions, strategy: type[ConversionStrategy]
) -> dict[str, Any]:
    """Of the twin of one encoder's config."""
    decoder = as_decoder(dense)
    if strategy.needs_gates and not decoder.gated_mlp:
        raise UserError(
            f"strategy {strategy.name} needs gated FFNs, and those of a {dense.model_type} are not; "
            "choose --strategy exact"
        )
    asked = options.shared_expert_intermediate_size
    if not strategy.keeps_ffns and not strategy.needs_gates:
        if asked:
            raise UserError(
                f"--shared-expert-intermediate-size {asked}: strategy {strategy.name} makes no shared expert of an "
                "encoder; leave it out"
            )
        options = replace(options, shared_expert_intermediate_size=0)
    sizes = chosen_sizes(strategy, decoder, options)
    return {
        **asdict(sizes),
        "norm_topk_prob": options.norm_topk_prob,
        "private_experts": options.private_experts,
        **({} if options.router_input is None else {"router_input": options.router_input}),
    }


def _twin_config(checkpoint: DenseCheckpoint, options: ConversionOptions, strategy: type[ConversionStrategy]) -> Any:
    dense = checkpoint.config
    twin = getattr(mhmoe, PREFIX + type(dense).__name__)
    values = dense.to_dict()
    values["architectures"] = [PREFIX + _dense_class(checkpoint).__name__]
    values["dtype"] = chosen_dtype(checkpoint, options)
    for key in ("model_type", "transformers_version", "auto_map"):
        values.pop(key, None)
    try:
        if hasattr(twin, "moe_config"):
            values |= _moe_fields(dense, options, strategy)
        for name in getattr(twin, "towers", dict)():
            values[name] = {**values[name], **_moe_fields(getattr(dense, name), options, strategy)}
            del values[name]["model_type"]
        return twin.from_dict(values)
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error


def _names(classes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (classes,) if isinstance(classes, str) else classes or ()
