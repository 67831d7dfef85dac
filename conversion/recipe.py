"""A recipe: one conversion with everything decided, before a tensor is read."""

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from mhmoe import MHMoEConfig, MHMoEForCausalLM
from mhmoe.configuration import Costs, costs
from mhmoe.configuration.parity import match_smoe
from mhmoe.errors import UserError, one_line
from mhmoe.intake import TOKENIZER_FILES
from mhmoe.modeling_mhmoe.modeling_mhmoe import AUTO_MAP
from mhmoe.options import as_flags, command_line, flag

from .calibration import read_rows
from .checkpoint import DTYPES, DenseCheckpoint
from .families import carried_fields
from .options import ConversionOptions
from .sizes import Sizes, default_num_experts, ffn_matrices, sizes_of
from .strategies import STRATEGIES, ConversionStrategy, StrategyOptions
from .tensors import DenseWeights, plan_tensors
from .writer import PlannedTensor


FAMILY = ("moe_latent_size", "private_experts", "router_input")  # options that ask for layers of papers after P2
MOST_PARAMETERS = 10**14  # a hundred times what anybody has trained


@dataclass(frozen=True)
class CalibrationText:
    """
    Attributes:
        token_ids: (B, T).
        facts: of each file its name and SHA-256, and the number of tokens, for the report.
    """

    token_ids: torch.Tensor
    facts: list[dict[str, str | int]]


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        checkpoint: the source.
        options: as the user gave them.
        strategy: from dense FFNs to MH-MoE layers.
        strategy_options: its own options.
        config: of the MH-MoE model.
        small_files: of the source, to be copied.
        generates: whether it writes text, by a generation config.
    """

    small_files: ClassVar[tuple[str, ...]] = TOKENIZER_FILES
    generates: ClassVar[bool] = True

    checkpoint: DenseCheckpoint
    options: ConversionOptions
    strategy: type[ConversionStrategy]
    strategy_options: StrategyOptions
    config: MHMoEConfig

    @classmethod
    def resolve(cls, checkpoint: DenseCheckpoint, options: ConversionOptions) -> "Recipe":
        """
        Decide what `options` leave open.

        Raises:
            UserError: the sizes do not fit, or options do not go together.
        """
        strategy = STRATEGIES[options.strategy]
        strategy_options = own_options(strategy, options)
        _check_text(strategy, options)
        check_family(strategy, options)
        config = _mhmoe_config(checkpoint, options, chosen_sizes(strategy, checkpoint.config, options))
        recipe = cls(checkpoint, options, strategy, strategy_options, config)
        strategy.check(recipe)
        return recipe

    @property
    def auto_class(self) -> str:
        """With which users load the model."""
        return "AutoModelForCausalLM"

    @property
    def pipeline_tag(self) -> str:
        """What the model is for, in the Hub's words."""
        return "text-generation"

    @property
    def dense_config(self) -> PreTrainedConfig:
        """Of the source."""
        return self.checkpoint.config

    @property
    def sizes(self) -> Sizes:
        """Of the MH-MoE layers."""
        return sizes_of(self.config)

    @property
    def reported_sizes(self) -> dict[str, int]:
        """Those that are not `None`, and that each head has its own experts, where it is so."""
        private = getattr(self.config, "private_experts", False)
        return {**self.sizes.given(), **({"private_experts": True} if private else {})}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the MH-MoE model's tensors, in its order."""
        try:
            with torch.device("meta"):
                model = MHMoEForCausalLM(self.config)
        except Exception as error:  # of a field that no check of the config knows
            file = self.checkpoint.folder / CONFIG_NAME
            raise UserError(f"{file}: no model can be built so ({one_line(error)}); get it again") from error
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @property
    def ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of one MH-MoE layer, by their names in it, in the model's order; all layers are alike."""
        first = "model.layers.0.mlp."
        return {name.removeprefix(first): shape for name, shape in self.shapes.items() if name.startswith(first)}

    @cached_property
    def costs(self) -> dict[str, Costs]:
        """Of the two models, by "dense" and "mhmoe"."""
        return {"dense": costs(self.dense_config), "mhmoe": costs(self.config)}

    def reference(self) -> tuple[Sizes, Costs]:
        """
        The sparse MoE that `--match smoe` is measured against, with the shared expert that is asked for.

        Raises:
            UserError: the sizes do not fit.
        """
        sizes = reference_sizes(self.options, self.dense_config.intermediate_size)
        try:
            return sizes, costs(MHMoEConfig(**carried_fields(self.dense_config), **asdict(sizes)))
        except (ValueError, StrictDataclassError) as error:
            raise UserError(one_line(error)) from error

    @property
    def depth_and_width(self) -> tuple[int, int]:
        """Layers and hidden size."""
        return self.config.num_hidden_layers, self.config.hidden_size

    def peak_memory(self, stored_itemsize: int) -> int:
        """Bytes that converting takes, estimated."""
        return self.strategy.peak_memory(self, stored_itemsize)

    def check_source(self) -> None:
        """
        Raises:
            UserError: names all tensors that are missing, of another size, or without a place in MH-MoE.
        """
        DenseWeights(self.checkpoint, self.shapes)

    def plan_tensors(self, text: "CalibrationText | None") -> tuple[dict[str, PlannedTensor], Callable[[], dict]]:
        """What to write, and what then gives the figures that the strategy measured."""
        weights = DenseWeights(self.checkpoint, self.shapes)
        strategy = self.strategy(self, weights, None if text is None else text.token_ids)
        return plan_tensors(self, weights, strategy), strategy.measured

    def write_config(self, folder: Path) -> None:
        """With the code that a machine without this package needs."""
        config = copy.deepcopy(self.config)
        config.auto_map = dict(AUTO_MAP)
        with torch.device("meta"):
            model = MHMoEForCausalLM(config)
        # ty: ignore[invalid-argument-type]: a config, or some as a list
        custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)

    def command(self, output: Path, paths: bool = False) -> str:
        """
        The command that makes the same files again, with every size named. Folders and files have their names alone,
        as what is published should not tell where they lay, or with `paths` as the user wrote them.
        """
        source, target, calibration = str(self.checkpoint.source), str(output), self.options.calibration_files
        if not paths:
            source, target = self.checkpoint.name, Path(os.path.abspath(output)).name
            calibration = [Path(file.name) for file in calibration]
        resolved = replace(self.options, **asdict(self.sizes), calibration=calibration)
        text = resolved.names("text") if calibration else []
        names = [*resolved.names("strategy"), *resolved.names("sizes"), *resolved.names("routing"), *text]
        flags = (
            as_flags(resolved, names) + as_flags(self.strategy_options) + as_flags(resolved, resolved.names("files"))
        )
        return command_line(["mhmoe", "convert", source, target, *flags])

    def calibration_text(self) -> CalibrationText | None:
        """
        The text that the strategy or the router learns from, `None` where none does.

        Raises:
            UserError: it cannot be read, or the strategy needs one and there is none.
        """
        options = self.options
        if not options.calibration_files:
            if self.strategy.needs_text:
                raise UserError(f"strategy {self.strategy.name} needs a text: give --calibration FILE")
            return None
        rows = read_rows(
            self.checkpoint, options.calibration_files, options.calibration_tokens, options.trust_remote_code
        )
        facts = []
        for file, own in rows.items():
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            facts.append({"file": file.name, "sha256": digest, "tokens": own.numel()})
        return CalibrationText(torch.cat([*rows.values()]), facts)


def own_options(strategy: type[ConversionStrategy], options: ConversionOptions) -> StrategyOptions:
    known = {field.name for field in fields(strategy.Options)}
    if foreign := sorted(options.strategy_options.keys() - known):
        value = options.strategy_options[foreign[0]]
        raise UserError(f"{flag(foreign[0])} {value}: strategy {strategy.name} has no such option; leave it out")
    return strategy.Options(**options.strategy_options)


def _check_text(strategy: type[ConversionStrategy], options: ConversionOptions) -> None:
    texts = options.calibration_files
    if not texts and options.router_init == "kmeans":
        raise UserError("--router-init kmeans clusters a text; give --calibration FILE")
    if texts and not strategy.needs_text and options.router_init == "random":
        raise UserError(
            f"--calibration {texts[0]}: strategy {strategy.name} uses no text; leave it out, or add "
            "--router-init kmeans"
        )


def check_family(strategy: type[ConversionStrategy], options: ConversionOptions) -> None:
    """A [`UserError`] for fields of later papers that the strategy can give no start."""
    asked = [name for name in FAMILY if getattr(options, name)]
    for name in asked:
        if name not in strategy.family:
            value = "" if name == "private_experts" else f" {getattr(options, name)}"
            raise UserError(
                f"{flag(name)}{value}: strategy {strategy.name} makes no such layers; leave it out, or choose "
                "--strategy exact"
            )
    if options.router_init == "kmeans" and {*asked} & {"private_experts", "router_input"}:
        raise UserError("--router-init kmeans makes rows for all heads and their sub-tokens alone; leave it out")


def chosen_sizes(
    strategy: type[ConversionStrategy], dense_config: PreTrainedConfig, options: ConversionOptions
) -> Sizes:
    asked = Sizes(**{name: getattr(options, name) for name in options.names("sizes")})
    if options.match == "dense" and None not in (asked.moe_intermediate_size, asked.shared_expert_intermediate_size):
        raise UserError("--match dense solves one of the two inner sizes; give one of them at most")
    if options.match == "smoe" and (asked.moe_intermediate_size, asked.num_experts) != (None, None):
        raise UserError("--match smoe solves --moe-intermediate-size and --num-experts; leave them out")
    heads = strategy.default_heads(dense_config) if asked.num_moe_heads is None else asked.num_moe_heads
    sizes = replace(asked, num_moe_heads=heads)
    if asked.num_experts is None:
        holders = heads if options.private_experts else 1
        sizes = replace(sizes, num_experts=default_num_experts(asked.num_experts_per_tok, max(holders, 1)))
    if asked.moe_intermediate_size is None:
        sizes = replace(sizes, moe_intermediate_size=strategy.default_inner_size(dense_config, max(heads, 1)))
    if options.match == "dense":
        sizes = strategy.match_dense(dense_config, sizes)
    elif options.match == "smoe":
        sizes = _matched_to_smoe(dense_config, sizes, options)
    return replace(sizes, shared_expert_intermediate_size=strategy.shared_width(dense_config, sizes))


def _matched_to_smoe(dense_config: PreTrainedConfig, sizes: Sizes, options: ConversionOptions) -> Sizes:
    try:
        solved = match_smoe(
            dense_config.hidden_size,
            sizes.num_moe_heads,
            sizes.num_experts_per_tok,
            reference_size=dense_config.intermediate_size,
            reference_experts=options.reference_experts,
            reference_top_k=options.reference_top_k,
            matrices=ffn_matrices(dense_config),
            latent_size=sizes.moe_latent_size,
            private_experts=options.private_experts,
        )
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return replace(sizes, moe_intermediate_size=solved.moe_intermediate_size, num_experts=solved.num_experts)


def reference_sizes(options: ConversionOptions, intermediate_size: int) -> Sizes:
    """Of the sparse MoE that `--match smoe` is measured against, whose experts are as wide as the dense FFN."""
    return Sizes(
        num_moe_heads=1,
        num_experts=options.reference_experts,
        num_experts_per_tok=options.reference_top_k,
        moe_intermediate_size=intermediate_size,
        shared_expert_intermediate_size=options.shared_expert_intermediate_size or 0,
    )


def chosen_dtype(checkpoint: DenseCheckpoint, options: ConversionOptions) -> torch.dtype | str:
    """Of the model: the one that is asked for, or that of the source's config, or in which all its tensors are."""
    if options.dtype != "auto":
        return options.dtype
    if checkpoint.config.dtype is not None:
        return checkpoint.config.dtype
    stored = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in DTYPES}
    return "float32" if len(stored) != 1 else str(DTYPES[stored.pop()]).removeprefix("torch.")


def check_size(parameters: int, sizes: Sizes) -> None:
    """A [`UserError`] where these sizes make a model that no machine holds."""
    if parameters > MOST_PARAMETERS:
        asked = ", ".join(f"{name}={value}" for name, value in asdict(sizes).items())
        raise UserError(f"{asked}: makes {parameters:.1e} parameters, more than any machine holds; give smaller ones")


def _mhmoe_config(checkpoint: DenseCheckpoint, options: ConversionOptions, sizes: Sizes) -> MHMoEConfig:
    carried = carried_fields(checkpoint.config)
    carried["dtype"] = chosen_dtype(checkpoint, options)
    try:
        config = MHMoEConfig(
            **carried,
            **asdict(sizes),
            norm_topk_prob=options.norm_topk_prob,
            private_experts=options.private_experts,
            **({} if options.router_input is None else {"router_input": options.router_input}),
            architectures=[MHMoEForCausalLM.__name__],
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error
    check_size(costs(config).parameters, sizes)
    return config
