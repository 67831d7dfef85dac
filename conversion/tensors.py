"""Which tensors a conversion reads, and which it writes."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from mhmoe.errors import UserError

from .checkpoint import DTYPES, DenseCheckpoint
from .strategies import ConversionStrategy
from .writer import PlannedTensor


if TYPE_CHECKING:
    from .recipe import Recipe

EMBEDDINGS = {"lm_head.weight", "model.embed_tokens.weight"}
# a buffer that old versions of transformers saved; it is computed from the config
DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class DenseWeights:
    """
    The tensors of a dense checkpoint, by name. That they are those that its config asks for is checked here; none is
    read before `load`.

    Args:
        checkpoint: the source.
        shapes: of the MH-MoE model's tensors: those besides the FFNs have the dense model's names and sizes.

    Raises:
        UserError: names all tensors that are missing, of another size, or without a place in MH-MoE.
    """

    def __init__(self, checkpoint: DenseCheckpoint, shapes: Mapping[str, tuple[int, ...]]):
        self._checkpoint = checkpoint
        self._names = _checked_names(checkpoint, shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def load(self, name: str) -> torch.Tensor:
        """The tensor `name`, as stored; the input embedding may be stored as the output embedding."""
        if name not in self and name == "model.embed_tokens.weight":
            name = "lm_head.weight"  # the two are tied
        return self._checkpoint.load(name)

    def dtype(self, name: str) -> torch.dtype:
        """In which the tensor `name` is stored."""
        return DTYPES[self._checkpoint.tensors[name].dtype]

    def ffn(self, layer: int) -> "DenseFFN":
        """The FFN of a layer."""
        return DenseFFN(self, layer)


class DenseFFN(Mapping[str, torch.Tensor]):
    """The tensors of one dense FFN: `ffn["gate_proj.weight"]`, (ff, d), and so on, each read when it is asked for."""

    def __init__(self, weights: DenseWeights, layer: int):
        parts = (f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias"))
        names = {part: f"model.layers.{layer}.mlp.{part}" for part in parts}
        self._names = {part: name for part, name in names.items() if name in weights}
        self._weights = weights

    def __getitem__(self, part: str) -> torch.Tensor:
        return self._weights.load(self._names[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def dtype(self, part: str) -> torch.dtype:
        """In which a tensor is stored."""
        return self._weights.dtype(self._names[part])


class MadeLayers:
    """
    The tensors of the layers that a strategy makes, one at a time. In the model's order each is made once; one that is
    asked for out of order takes what comes before it in its layer with it.
    """

    def __init__(self, strategy: ConversionStrategy, weights: DenseWeights):
        self._strategy = strategy
        self._weights = weights
        self._layer, self._rest = -1, iter(())

    def load(self, layer: int, part: str) -> torch.Tensor:
        """The tensor `part` of a layer."""
        if layer == self._layer and (made := self._next(part)) is not None:
            return made
        self._layer, self._rest = layer, self._strategy.layer(layer, self._weights.ffn(layer))
        if (made := self._next(part)) is None:
            raise NotImplementedError(f"strategy {self._strategy.name} makes no {part} of layer {layer}")
        return made

    def _next(self, part: str) -> torch.Tensor | None:
        for name, made in self._rest:
            if name == part:
                return made
        return None


def plan_tensors(recipe: "Recipe", weights: DenseWeights, strategy: ConversionStrategy) -> dict[str, PlannedTensor]:
    """
    What to write, in the model's order: each tensor in the config's type or, where the user asks for none, in that in
    which what it is made from is stored.
    """
    dtype, as_stored = recipe.config.dtype, recipe.options.dtype == "auto"
    assert isinstance(dtype, torch.dtype)  # which a recipe has decided
    made = MadeLayers(strategy, weights)
    in_ffns = {
        f"model.layers.{layer}.mlp.{part}": (layer, part)
        for layer in range(recipe.config.num_hidden_layers)
        for part in recipe.ffn_shapes
    }
    planned = {}
    for name, shape in recipe.shapes.items():
        if name in in_ffns:
            layer, part = in_ffns[name]
            made_from = strategy.made_from.get(part)
            stored = None if made_from is None else weights.ffn(layer).dtype(made_from)
            planned[name] = PlannedTensor(
                shape, stored if stored and as_stored else dtype, partial(made.load, layer, part)
            )
        elif name in weights:  # of two tied tensors, one may not be
            planned[name] = PlannedTensor(
                shape, weights.dtype(name) if as_stored else dtype, partial(weights.load, name)
            )
    return planned


def _checked_names(checkpoint: DenseCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    expected = _dense_shapes(shapes, checkpoint.config)
    unknown, misshapen, found = [], [], set()
    for name, stored in checkpoint.tensors.items():
        if DROPPED.fullmatch(name):
            continue
        if name not in expected or stored.dtype not in DTYPES:
            unknown.append(f"{name} ({stored.dtype})")
        elif expected[name] != stored.shape:
            misshapen.append(f"{name} is {stored.shape} but config.json asks for {expected[name]}")
        else:
            found.add(name)

    missing = sorted(expected.keys() - found)
    if checkpoint.config.tie_word_embeddings and EMBEDDINGS & found:
        missing = [name for name in missing if name not in EMBEDDINGS]
    for problem, names in (
        ("tensors that MH-MoE has no place for", unknown),
        ("tensors of other sizes", misshapen),
        ("lacks tensors", missing),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{checkpoint.folder}: {problem}: {', '.join(names[:3])}{more}; does config.json belong to them?"
            )
    return found


def _dense_shapes(shapes: Mapping[str, tuple[int, ...]], dense_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the dense model's tensors, from those of an MH-MoE model."""
    dense = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    ff, d = dense_config.intermediate_size, dense_config.hidden_size
    for layer in range(dense_config.num_hidden_layers):
        for name, (outputs, inputs) in {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}.items():
            dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (outputs, inputs)
            if getattr(dense_config, "mlp_bias", False):
                dense[f"model.layers.{layer}.mlp.{name}_proj.bias"] = (outputs,)
    return dense
