"""What a conversion would make and cost, from config and safetensors headers alone: no weights, no model."""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import prod
from operator import mul
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from mhmoe.configuration import MHMoEConfig, costs
from mhmoe.configuration.parity import match_dense, match_smoe
from mhmoe.errors import UserError, one_line

from .checkpoint import DTYPES, DenseCheckpoint
from .convert import STRATEGIES
from .families import carried_fields
from .sizes import default_moe_intermediate_size, default_num_moe_heads
from .strategy import CALIBRATION_TOKENS


Match = Literal["dense", "smoe"]
PROGRAM_BYTES = 500_000_000  # what Python, torch and transformers take before anything is converted


@dataclass(frozen=True)
class Planned:
    """
    What one model costs. Multiply-adds are per token and leave out the attention scores, which grow with the context.

    Attributes:
        name: "dense", "reference SMoE", or a strategy.
        sizes: of the MH-MoE layers; empty for "dense".
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
    """A dense checkpoint (`source`, `model_type`, its weight files), and beside it what it would become."""

    source: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    weight_files: int
    models: list[Planned]  # the dense one first

    def as_dict(self) -> dict:
        """The same, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The same, for people."""
        dense = self.models[0]
        rows = [
            ("", [model.name for model in self.models]),
            ("MoE heads", [_size(model, "num_moe_heads") for model in self.models]),
            ("routed experts per layer", [_size(model, "num_experts") for model in self.models]),
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
            f"{self.weight_files} weight file{'s' if self.weight_files > 1 else ''}"
        )
        lines = [f"{label:<31}" + "".join(map(str.rjust, cells, widths)) for label, cells in rows]
        return "\n".join([title, "", *lines])


def plan(
    source: str | Path,
    *,
    num_moe_heads: int | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int | None = None,
    shared_expert_intermediate_size: int | None = None,
    match: Match | None = None,
    reference_experts: int = 8,
    reference_top_k: int = 1,
    dtype: str = "auto",
    revision: str | None = None,
) -> Plan:
    """
    Say what `convert` would make of `source`.

    Args:
        source: folder, or model id on the Hub, of which only JSON files and headers are fetched.
        num_moe_heads, num_experts, num_experts_per_tok, moe_intermediate_size: as `convert` takes them.
        shared_expert_intermediate_size: of the one model to plan; by default each strategy's own is shown.
        match: "dense" solves the inner sizes for the dense FFN's multiply-adds: the routed experts' if
            `shared_expert_intermediate_size` is given, and the shared expert's if not. "smoe" solves inner size and
            number of routed experts for multiply-adds and parameters of a sparse MoE whose experts are as wide as the
            dense FFN (P2); a shared expert is added to both.
        reference_experts: of that sparse MoE.
        reference_top_k: of that sparse MoE, per token.
        dtype: of the written tensors; "auto" is the stored one.
        revision: branch, tag or commit of `source` on the Hub.

    Raises:
        UserError: the source cannot be read, or the sizes do not fit.
    """
    checkpoint = DenseCheckpoint(source, revision, weights=False)
    dense = checkpoint.config
    d, inner = dense.hidden_size, dense.intermediate_size
    heads = default_num_moe_heads(dense) if num_moe_heads is None else num_moe_heads
    size, experts = moe_intermediate_size, num_experts
    if size is None:
        size = default_moe_intermediate_size(dense, max(heads, 1))
    if experts is None:
        experts = max(32, num_experts_per_tok)
    _config(dense, heads, experts, num_experts_per_tok, size, 0)  # refuses what does not fit
    shared, reference = shared_expert_intermediate_size, None
    try:
        if match == "smoe":
            if (moe_intermediate_size, num_experts) != (None, None):
                raise ValueError("--match smoe solves --moe-intermediate-size and --num-experts; leave them out")
            solved = match_smoe(
                d,
                heads,
                num_experts_per_tok,
                reference_size=inner,
                reference_experts=reference_experts,
                reference_top_k=reference_top_k,
            )
            size, experts, shared = solved.moe_intermediate_size, solved.num_experts, shared or 0
            reference = _config(dense, 1, reference_experts, reference_top_k, inner, shared)
        elif match == "dense":
            if None not in (moe_intermediate_size, shared):
                raise ValueError("--match dense solves one of the two inner sizes; give one of them at most")
            size, shared = match_dense(d, inner, heads, num_experts_per_tok, shared_size=shared, size=size)
    except ValueError as error:
        raise UserError(one_line(error)) from error

    if other := [name for name, tensor in checkpoint.tensors.items() if tensor.dtype not in DTYPES]:
        found = checkpoint.tensors[other[0]].dtype
        raise UserError(f"{checkpoint.name}: tensor {other[0]} is {found}; only {', '.join(DTYPES)} are converted")
    stored = [DTYPES[tensor.dtype].itemsize for tensor in checkpoint.tensors.values()]
    widest = max(stored)
    itemsize = getattr(torch, dtype).itemsize if dtype != "auto" else max(stored, key=stored.count)
    source_bytes = sum(map(mul, (prod(tensor.shape) for tensor in checkpoint.tensors.values()), stored))
    models = [replace(_planned("dense", dense, itemsize), disk_bytes=source_bytes)]
    if reference is not None:
        models.append(_planned("reference SMoE", reference, itemsize))
    if shared is not None:
        configs = {"MH-MoE": _config(dense, heads, experts, num_experts_per_tok, size, shared)}
    else:
        configs = _by_strategy(dense, num_moe_heads, experts, num_experts_per_tok, moe_intermediate_size)
    for name, config in configs.items():
        planned = _planned(name, config, itemsize)
        peak = _calibration_memory(dense, widest) if name == "calibrated" else _peak_memory(config, widest)
        models.append(replace(planned, peak_memory_bytes=peak))
    files = len(checkpoint.weight_files)
    return Plan(checkpoint.name, dense.model_type, dense.num_hidden_layers, d, files, models)


def _by_strategy(dense, heads: int | None, experts: int, top_k: int, size: int | None) -> dict[str, MHMoEConfig]:
    """What each strategy would make, where it is possible; sizes that are `None` are the strategy's own."""
    configs = {}
    for name, strategy in STRATEGIES.items():
        own_heads = strategy.default_heads(dense) if heads is None else heads
        sizes = {
            "num_moe_heads": own_heads,
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": strategy.default_inner_size(dense, own_heads) if size is None else size,
        }
        recipe = strategy(dense, sizes, seed=0, calibration=torch.empty(0))
        with suppress(UserError):
            config = _config(dense, *sizes.values(), recipe.shared_width(None))
            recipe.check(config)
            configs[name] = config
    return configs


def _config(dense, heads: int, experts: int, top_k: int, size: int, shared: int) -> MHMoEConfig:
    try:
        return MHMoEConfig(
            **carried_fields(dense),
            num_moe_heads=heads,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=size,
            shared_expert_intermediate_size=shared,
            norm_topk_prob=True,
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error


def _planned(name: str, config, itemsize: int) -> Planned:
    counted = costs(config)
    fields = ("num_moe_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    fields += ("shared_expert_intermediate_size",)
    return Planned(
        name=name,
        sizes={field: getattr(config, field) for field in fields} if config.model_type == "mhmoe" else {},
        parameters=counted.parameters,
        active_parameters=counted.active_parameters,
        ffn_multiply_adds=counted.ffn_multiply_adds,
        model_multiply_adds=counted.multiply_adds,
        disk_bytes=counted.parameters * itemsize,
    )


def _peak_memory(config: MHMoEConfig, stored_itemsize: int) -> int:
    """Bytes, estimated: one tensor is written while the next one is read, or made in float32."""
    d, sub = config.hidden_size, config.hidden_size // config.num_moe_heads
    routed = config.num_experts * config.moe_intermediate_size * sub
    embedding = config.vocab_size * d * stored_itemsize
    in_order = [embedding, config.num_attention_heads * config.head_dim * d * stored_itemsize]
    in_order += [4 * d * d, 4 * d * d, 4 * 2 * routed, 4 * routed]
    in_order += 3 * [d * config.shared_expert_intermediate_size * stored_itemsize]
    in_order += [] if config.tie_word_embeddings else [d * stored_itemsize, embedding]
    return PROGRAM_BYTES + max(a + b for a, b in pairwise(in_order))


def _calibration_memory(dense: PreTrainedConfig, stored_itemsize: int) -> int:
    """
    Bytes, estimated: the text's hidden states and what the FFN answers to them, the embedding, and of one layer the
    dense FFN and either the Gram matrix of its neurons with what inverting it takes, or the new FFN with gradients and
    Adam's moments. All but the embedding is in float32.
    """
    states = 4 * CALIBRATION_TOKENS * dense.hidden_size
    ffn = 4 * 3 * dense.hidden_size * dense.intermediate_size
    gram = 4 * dense.intermediate_size**2
    embedding = dense.vocab_size * dense.hidden_size * stored_itemsize
    return PROGRAM_BYTES + embedding + 5 * states + ffn + max(4 * gram, 5 * ffn)


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
