"""What a conversion would make and cost, from config and safetensors headers alone: no weights."""

from dataclasses import asdict, dataclass, replace
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

import torch

from mhmoe.configuration import Costs
from mhmoe.errors import UserError, one_line
from mhmoe.options import as_flags, command_line

from .checkpoint import BUFFER_DTYPES, DTYPES, DenseCheckpoint
from .encoders import recipe_for
from .families import ENCODERS
from .options import ConversionOptions
from .recipe import Recipe
from .strategies import STRATEGIES


@dataclass(frozen=True)
class Planned:
    """
    What one model costs. Multiply-adds are per token and leave out the attention scores, which grow with the context.

    Attributes:
        name: "dense", "reference SMoE", or a strategy.
        sizes: of the MH-MoE layers; empty for "dense"; those in which the encoders of one model differ are left out.
        parameters: in all; a tied embedding counts once.
        active_parameters: those that one token meets, at most.
        ffn_multiply_adds: in all FFNs, routers left out, as the papers count.
        model_multiply_adds: in all projections, FFNs, routers and the output layer.
        disk_bytes: of the weights.
        peak_memory_bytes: of converting, estimated; `None` where nothing is converted.
    """

    name: str
    sizes: dict[str, int]
    parameters: int
    active_parameters: int
    ffn_multiply_adds: int
    model_multiply_adds: int
    disk_bytes: int
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """
    A dense checkpoint (`source`, `model_type`, its weight files), and beside it what it would become.

    Attributes:
        models: the dense one first.
        commands: that convert so, by strategy; OUTPUT and the text are the user's to fill in.
        unfit: the other strategies, and why they do not fit.
    """

    source: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    weight_files: int
    models: list[Planned]
    commands: dict[str, str]
    unfit: dict[str, str]

    def as_dict(self) -> dict:
        """The same, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The same, for people."""
        dense = self.models[0]
        rows = [
            ("", [model.name for model in self.models]),
            ("MoE heads", [_size(model, "num_moe_heads") for model in self.models]),
            ("routed experts per layer", [_experts(model) for model in self.models]),
            ("  chosen per sub-token", [_size(model, "num_experts_per_tok") for model in self.models]),
            ("  inner size", [_size(model, "moe_intermediate_size") for model in self.models]),
            ("shared expert's inner size", [_size(model, "shared_expert_intermediate_size") for model in self.models]),
            ("parameters", [_count(model.parameters) for model in self.models]),
            ("  active per token, at most", [_count(model.active_parameters) for model in self.models]),
            ("FFN multiply-adds per token", [_count(model.ffn_multiply_adds) for model in self.models]),
            ("  against dense", [_ratio(model, dense, "ffn_multiply_adds") for model in self.models]),
            ("model multiply-adds per token", [_count(model.model_multiply_adds) for model in self.models]),
            ("  against dense", [_ratio(model, dense, "model_multiply_adds") for model in self.models]),
            ("disk", [f"{model.disk_bytes / 1e9:,.2f} GB" for model in self.models]),
            ("peak memory of converting", [_memory(model) for model in self.models]),
        ]
        widths = [max(len(row[column]) for _, row in rows) + 2 for column in range(len(self.models))]
        title = (
            f"{self.source}: {self.model_type}, {self.num_hidden_layers} layers, hidden size {self.hidden_size}, "
            f"{self.weight_files or 'no'} weight file{'' if self.weight_files == 1 else 's'}"
        )
        lines = [f"{label:<31}" + "".join(map(str.rjust, cells, widths)) for label, cells in rows]
        if self.unfit:
            lines += ["", *(f"{name} does not fit: {reason}" for name, reason in self.unfit.items())]
        lines += ["", *self.commands.values()]
        return "\n".join([title, "", *lines])


def plan(source: str | Path, **options: Any) -> Plan:
    """
    Say what `convert` would make of `source` with each strategy.

    Args:
        source: folder, or model id on the Hub, of which only JSON files and headers are fetched.
        options: fields of [`ConversionOptions`] besides `strategy`.

    Raises:
        UserError: the source cannot be read, or no strategy fits.
        TypeError: there is no such option.
    """
    asked = ConversionOptions.of(**options)
    checkpoint = DenseCheckpoint(source, asked.revision, weights=False)
    known = DTYPES | (BUFFER_DTYPES if checkpoint.config.model_type in ENCODERS else {})
    if other := [name for name, tensor in checkpoint.tensors.items() if tensor.dtype not in known]:
        found = checkpoint.tensors[other[0]].dtype
        raise UserError(f"{checkpoint.name}: tensor {other[0]} is {found}; only {', '.join(known)} are converted")
    recipes, unfit = resolve_recipes(checkpoint, asked)
    first = next(iter(recipes.values()))
    first.check_source()

    stored = [known[tensor.dtype].itemsize for tensor in checkpoint.tensors.values()]
    itemsize = getattr(torch, asked.dtype).itemsize if asked.dtype != "auto" else max(stored, key=stored.count)
    source_bytes = sum(map(mul, (prod(tensor.shape) for tensor in checkpoint.tensors.values()), stored))
    models = [replace(_planned("dense", first.costs["dense"], {}, itemsize), disk_bytes=source_bytes)]
    if asked.match == "smoe":
        sizes, counted = first.reference()
        models.append(_planned("reference SMoE", counted, sizes.given(), itemsize))
    for name, recipe in recipes.items():
        planned = _planned(name, recipe.costs["mhmoe"], recipe.reported_sizes, itemsize)
        models.append(replace(planned, peak_memory_bytes=recipe.peak_memory(max(stored))))
    layers, width = first.depth_and_width
    return Plan(
        source=checkpoint.name,
        model_type=checkpoint.config.model_type,
        num_hidden_layers=layers,
        hidden_size=width,
        weight_files=len(checkpoint.weight_files),
        models=models,
        commands={name: _command(source, recipe) for name, recipe in recipes.items()},
        unfit=unfit,
    )


def resolve_recipes(
    checkpoint: DenseCheckpoint, options: ConversionOptions
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """By strategy, for those that fit, and the reasons of the others; a [`UserError`] if none fits."""
    recipes, unfit = {}, {}
    for name in STRATEGIES:
        try:
            recipes[name] = recipe_for(checkpoint, replace(options, strategy=name))
        except UserError as error:
            unfit[name] = one_line(error)
    if not recipes:
        reasons = dict.fromkeys(unfit.values())
        told = unfit.values() if len(reasons) == 1 else (f"{name}: {reason}" for name, reason in unfit.items())
        raise UserError("; ".join(dict.fromkeys(told)))
    return recipes, unfit


def _command(source: str | Path, recipe: Recipe) -> str:
    """With what the user asked for."""
    options = recipe.options
    unasked = ConversionOptions()
    asked = [
        name
        for group in ("sizes", "match", "routing", "files")
        for name in options.names(group)
        if getattr(options, name) != getattr(unasked, name)
    ]
    words = command_line(["mhmoe", "convert", str(source), "OUTPUT", *as_flags(options, ["strategy", *asked])])
    return f"{words} --calibration FILE" if recipe.strategy.needs_text and not options.calibration_files else words


def _planned(name: str, counted: Costs, sizes: dict[str, int], itemsize: int) -> Planned:
    return Planned(
        name=name,
        sizes=sizes,
        parameters=counted.parameters,
        active_parameters=counted.active_parameters,
        ffn_multiply_adds=counted.ffn_multiply_adds,
        model_multiply_adds=counted.multiply_adds,
        disk_bytes=counted.parameters * itemsize,
    )


def _experts(model: Planned) -> str:
    heads = f"{model.sizes['num_moe_heads']} x " if "private_experts" in model.sizes else ""
    return heads + _size(model, "num_experts")


def _size(model: Planned, field: str) -> str:
    return str(model.sizes.get(field, ""))


def _count(number: int) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:,.2f}{unit}"
    return f"{number:,}"


def _memory(model: Planned) -> str:
    return "" if model.peak_memory_bytes is None else f"{model.peak_memory_bytes / 1e9:,.1f} GB"


def _ratio(model: Planned, dense: Planned, field: str) -> str:
    return f"x{getattr(model, field) / getattr(dense, field):.3f}"
