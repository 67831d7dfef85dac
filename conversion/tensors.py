"""Which tensors a conversion reads, and which it writes."""

from functools import partial

import torch
from transformers import PreTrainedConfig

from mhmoe.errors import UserError

from .calibration import Dense
from .checkpoint import DTYPES, DenseCheckpoint
from .exact import target_name
from .strategy import ConversionStrategy
from .writer import PlannedTensor


EMBEDDINGS = {"lm_head.weight", "model.embed_tokens.weight"}


def dense_origin(checkpoint: DenseCheckpoint, shapes: dict[str, tuple[int, ...]], tied: bool) -> dict[str, str]:
    """
    The checkpoint's tensors by the names that strategy exact has for them.

    Args:
        checkpoint: the source.
        shapes: of the MH-MoE model's tensors.
        tied: whether the input embedding is the output embedding, which then may be stored once.

    Raises:
        UserError: names all tensors that are missing, of another size, or without a place in MH-MoE.
    """
    expected = _dense_shapes(shapes, checkpoint.config)
    unknown, misshapen, origin = [], [], {}
    for dense_name, stored in checkpoint.tensors.items():
        try:
            name = target_name(dense_name)
        except KeyError:
            name = dense_name  # which no MH-MoE model has, or the table would
        if name is None:
            continue
        if name not in expected or stored.dtype not in DTYPES:
            unknown.append(f"{dense_name} ({stored.dtype})")
        elif expected[name] != stored.shape:
            misshapen.append(f"{dense_name} is {stored.shape} but config.json asks for {expected[name]}")
        else:
            origin[name] = dense_name

    missing = sorted(expected.keys() - origin.keys())
    if tied and EMBEDDINGS & origin.keys():
        missing = [name for name in missing if name not in EMBEDDINGS]
    for problem, found in (
        ("tensors that MH-MoE has no place for", unknown),
        ("tensors of other sizes", misshapen),
        ("lacks tensors", missing),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"{checkpoint.folder}: {problem}: {', '.join(found[:3])}{more}; does config.json belong to them?"
            )
    return origin


def load_dense(checkpoint: DenseCheckpoint, origin: dict[str, str], name: str) -> torch.Tensor:
    """A dense tensor by the name that strategy exact has for it."""
    if name not in origin and name == "model.embed_tokens.weight":
        name = "lm_head.weight"  # the two are tied
    return checkpoint.load(origin[name])


def plan_tensors(
    checkpoint: DenseCheckpoint,
    shapes: dict[str, tuple[int, ...]],
    origin: dict[str, str],
    load: Dense,
    recipe: ConversionStrategy,
    dtype: torch.dtype,
    as_stored: bool,
) -> dict[str, PlannedTensor]:
    """What to write, in the model's order, each as `dtype` or, with `as_stored`, as what it is made from is stored."""
    planned = {}
    for name, shape in shapes.items():
        if ".mlp." in name:
            sources = recipe.sources(name)
            made = partial(recipe.value, name, shape, load)
        elif name in origin:
            sources, made = (name,), partial(load, name)
        else:  # one of two tied tensors
            continue
        stored = DTYPES[checkpoint.tensors[origin[sources[0]]].dtype] if sources and as_stored else dtype
        planned[name] = PlannedTensor(shape, stored, made)
    return planned


def _dense_shapes(shapes: dict[str, tuple[int, ...]], dense: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The dense model's tensors under the names that strategy exact has for them, from an MH-MoE model's `shapes`."""
    kept = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    inner, outer = dense.intermediate_size, dense.hidden_size
    for layer in range(dense.num_hidden_layers):
        ffn = f"model.layers.{layer}.mlp.shared_expert"
        kept |= {f"{ffn}.{name}_proj.weight": (inner, outer) for name in ("gate", "up")}
        kept[f"{ffn}.down_proj.weight"] = (outer, inner)
        if getattr(dense, "mlp_bias", False):
            kept |= {f"{ffn}.{name}_proj.bias": (inner,) for name in ("gate", "up")}
            kept[f"{ffn}.down_proj.bias"] = (outer,)
    return kept
