"""`mhmoe plan --gpus`: the layouts of `conversion/layouts.py` for every model that a conversion of a source makes."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from mhmoe.errors import UserError
from mhmoe.intake import read_json
from mhmoe.loading import load_config
from mhmoe.options import add_options, option
from mhmoe.sources import find_folder

from .checkpoint import DenseCheckpoint
from .families import ENCODERS
from .layouts import (
    GIB,
    USABLE,
    Bytes,
    Run,
    Weights,
    activation_bytes,
    inference_bytes,
    inference_layouts,
    read_memory,
    training_layouts,
)
from .options import ConversionOptions
from .plan import resolve_recipes


LAUNCH = {  # by the first word of a layout's name
    "one": "mhmoe train MODEL",
    "DDP": "torchrun --nproc_per_node {gpus} -m mhmoe train MODEL",
    "FSDP2": "torchrun --nproc_per_node {gpus} -m mhmoe train MODEL "
    "--distributed_config '{{\"fsdp_size\": {gpus}{ep}}}'",
    "ZeRO-3": "accelerate launch --config_file examples/accelerate/deepspeed.yaml --num_processes {gpus} -m mhmoe "
    "train MODEL",
}


@dataclass(frozen=True)
class LayoutOptions:
    """
    What a model is laid out on, and for.

    Attributes:
        gpus: how many.
        memory: of one, in GiB or as "80GB".
        per_device_train_batch_size: rows on each GPU at once, in inference too.
        block_size: tokens of a row; by default as in `mhmoe train`.
        gradient_checkpointing: keep the layers' inputs alone for the backward pass.
    """

    gpus: int | None = option(None, "say which layouts fit on so many GPUs; needs --memory", "N")
    memory: str | None = option(None, "of one GPU, in GiB or as 80GB; goes with --gpus", "G")
    per_device_train_batch_size: int = option(
        8, "with --gpus: rows on each GPU at once (default: %(default)s, as of mhmoe train)", "B"
    )
    block_size: int | None = option(
        None, "with --gpus: tokens of a row (default: 1024, or max_position_embeddings if that is less)", "T"
    )
    gradient_checkpointing: bool = option(
        False, "with --gpus: keep only the layers' inputs for the backward pass of training"
    )

    def __post_init__(self):
        if (self.gpus is None) != (self.memory is None):
            raise UserError("gpus, memory: give both of them, or neither")
        for name in ("gpus", "per_device_train_batch_size", "block_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")

    def run(self, config: PreTrainedConfig) -> Run:
        block_size = self.block_size or min(1024, config.max_position_embeddings)
        return Run(self.per_device_train_batch_size, block_size, self.gradient_checkpointing)


def add_layout_options(parser) -> None:
    """The flags of `mhmoe plan` that lay a model out."""
    add_options(parser.add_argument_group("layouts on several GPUs"), LayoutOptions)


def layout_options(namespace: dict[str, Any]) -> LayoutOptions:
    """Those among the parsed options, which are removed from them."""
    names = [field.name for field in fields(LayoutOptions) if field.name in namespace]
    return LayoutOptions(**{name: namespace.pop(name) for name in names})


@dataclass(frozen=True)
class LaidOut:
    """One model: the bytes of one GPU in each layout, of training and of inference."""

    name: str
    parameters: int
    training: dict[str, Bytes]
    inference: dict[str, Bytes]


@dataclass(frozen=True)
class LayoutPlan:
    """
    What fits.

    Attributes:
        memory_bytes: of one GPU.
        tokens: on each GPU at once.
        training_dtype, inference_dtype: of the weights.
    """

    gpus: int
    memory_bytes: int
    tokens: int
    training_dtype: str
    inference_dtype: str
    models: list[LaidOut]

    def fits(self, layout: Bytes) -> bool:
        return layout.total <= USABLE * self.memory_bytes

    def as_dict(self) -> dict:
        """The same, for JSON, with `fits` beside the bytes."""
        described = asdict(self)
        for model, planned in zip(described["models"], self.models, strict=True):
            for kind in ("training", "inference"):
                for name, layout in getattr(planned, kind).items():
                    model[kind][name] |= {"total": layout.total, "fits": self.fits(layout)}
        return described

    def table(self) -> str:
        """The same, for people."""
        gpus = f"{self.gpus} GPUs" if self.gpus > 1 else "one GPU"
        memory = f"{self.memory_bytes / GIB:,.1f} GiB"
        title = f"{gpus} of {memory}, {self.tokens:,} tokens on each at once; GiB that each GPU needs:"
        width = max(len(model.name) for model in self.models) + 4
        lines = [title]
        for kind, dtype in (("training", self.training_dtype), ("inference", self.inference_dtype)):
            names = max((getattr(model, kind) for model in self.models), key=len)
            of = f"{kind} in {dtype}"
            lines += ["", f"{of:<24}" + "".join(model.name.rjust(max(width, 14)) for model in self.models)]
            for name in names:
                cells = [self._cell(getattr(model, kind).get(name)) for model in self.models]
                lines.append(f"  {name:<22}" + "".join(cell.rjust(max(width, 14)) for cell in cells))
        nothing = "nothing fits for training; try --gradient-checkpointing, fewer rows, or more GPUs"
        lines += ["", *(f"{model.name}: {self.command(model) or nothing}" for model in self.models)]
        return "\n".join(lines)

    def command(self, model: LaidOut) -> str | None:
        """That trains in the first layout that fits, `None` if none does."""
        name = next((name for name, layout in model.training.items() if self.fits(layout)), None)
        if name is None:
            return None
        words = name.split(" ")
        ep = f', "ep_size": {words[-1]}' if "EP" in words else ""
        return LAUNCH[words[0]].format(gpus=self.gpus, ep=ep)

    def _cell(self, layout: Bytes | None) -> str:
        if layout is None:
            return ""
        return f"{layout.total / GIB:,.1f} {'fits' if self.fits(layout) else '  no'}"


def plan_layouts(source: str | Path, layout: LayoutOptions, **options: Any) -> LayoutPlan:
    """
    Say which layouts of `source`, and of what `convert` would make of it, fit.

    Args:
        source: folder or id on the Hub of a dense or an MH-MoE model; its config is enough.
        layout: with `gpus` and `memory`.
        options: fields of [`ConversionOptions`] besides `strategy`.

    Raises:
        UserError: the source cannot be read, or the sizes do not fit.
    """
    assert layout.gpus is not None
    assert layout.memory is not None
    memory = read_memory(layout.memory)
    configs = _configs(source, options)
    first = next(iter(configs.values()))
    asked = options.get("dtype", "auto")
    training_dtype = "float32" if asked == "auto" else asked  # that of mhmoe train
    inference_dtype = str(first.dtype or torch.float32).removeprefix("torch.") if asked == "auto" else asked
    models = []
    for name, config in configs.items():
        weights, run = Weights.of(config), layout.run(config)
        of_training, of_inference = (getattr(torch, dtype).itemsize for dtype in (training_dtype, inference_dtype))
        activations = activation_bytes(config, run, of_training)
        working = inference_bytes(config, run, of_inference)
        models.append(
            LaidOut(
                name,
                weights.total,
                training_layouts(weights, layout.gpus, of_training, activations),
                inference_layouts(weights, layout.gpus, of_inference, working, config),
            )
        )
    tokens = layout.run(first).tokens
    return LayoutPlan(layout.gpus, memory, tokens, training_dtype, inference_dtype, models)


def is_mhmoe(source: str | Path, revision: str | None = None) -> bool:
    """Whether the model is MH-MoE already, and so not converted."""
    folder, _ = find_folder(str(source), revision, weights=False)
    return read_json(folder / "config.json").get("model_type") == "mhmoe"


def _configs(source: str | Path, options: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """By the names of the models."""
    revision = options.get("revision")
    if is_mhmoe(source, revision):
        folder, hub_id = find_folder(str(source), revision, weights=False)
        return {hub_id or folder.resolve().name: load_config(folder)}
    asked = ConversionOptions.of(**options)
    checkpoint = DenseCheckpoint(source, asked.revision, weights=False)
    if checkpoint.config.model_type in ENCODERS:
        raise UserError(
            f"--gpus: plans layouts of decoders, and a {checkpoint.config.model_type} is none; leave it out"
        )
    recipes, _ = resolve_recipes(checkpoint, asked)
    return {"dense": checkpoint.config} | {name: recipe.config for name, recipe in recipes.items()}
