"""
The models of both papers' tables, by name: `MHMoEConfig.from_preset("p2-mhmoe-head3")`.

P1 is arXiv 2404.15045: GELU FFNs of two matrices, the router of X-MoE, head and merge layers with bias. P2 is
arXiv 2411.16205: SwiGLU, a softmax router. In both, every second FFN of 12 is sparse. What the papers do not say, or
differs on purpose, is Llama's: norms, rotary positions, no biases elsewhere, P2's vocabulary of 32,000. P1's
sub-token residual (eq. 6) is left out, as in its authors' code and in P2; `sub_token_residual=True` adds it.

LatentMoE is arXiv 2601.18089. Its table 2 has two Transformers: one of 16B parameters with the sizes of
DeepSeek-V2-Lite (whose attention, first dense layer and vocabulary are not the paper's point; the last two are kept,
the attention is Llama's) and one of 95B, whose vocabulary the paper does not say. Each comes as a sparse MoE and, at a
quarter of the width, with four times as many experts ("eff"), of which a token reaches about four times as many
("acc").
"""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from mhmoe.errors import UserError

from .configuration_mhmoe import MHMoEConfig
from .parity import match_smoe, nearest_multiple


BACKBONE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "decoder_sparse_step": 2}
P1 = {
    **BACKBONE,
    "vocab_size": 100_277,  # the tokenizer of GPT-4
    "tie_word_embeddings": True,  # which table 11's counts tell
    "intermediate_size": 3072,
    "gated_mlp": False,
    "hidden_act": "gelu",
}
P1_SPARSE = {**P1, "num_experts_per_tok": 2, "router_type": "xmoe"}
P1_XMOE = {**P1_SPARSE, "num_moe_heads": 1, "moe_intermediate_size": 3072}
P1_MHMOE = {**P1_SPARSE, "num_moe_heads": 4, "head_merge_bias": True, "head_merge_init": "xavier"}
# Inner size of the experts for each number of experts: 4 beta h d with h = 4, and beta such that table 11 comes out.
P1_SIZES = {8: 11520, 16: 11664, 32: 12176, 64: 12192, 128: 12288, 256: 12256}

P2 = {**BACKBONE, "intermediate_size": 2048}
XAVIER = {"head_merge_init": "xavier"}  # P2 does not say; the authors' code starts both layers so
P2_COLUMNS = ("num_moe_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
P2_ROWS = {
    name: {**P2, **dict(zip(P2_COLUMNS, row, strict=True)), **start}
    for name, row, start in (
        ("p2-smoe", (1, 8, 1, 2048), {}),
        ("p2-fine-grained", (1, 16, 2, 1024), {}),
        ("p2-mhmoe-head2", (2, 40, 2, 768), XAVIER),
        ("p2-mhmoe-head3", (3, 96, 3, 512), XAVIER),
    )
}
SHARED = {"shared_expert_intermediate_size": 2048}
ONE_BIT = {"use_bitnet": True}
DENSE = {"num_experts": 1, "num_experts_per_tok": 1, "num_moe_heads": 1, "moe_intermediate_size": 8}  # none is built
MLPS = {"head_layer_depth": 1, "merge_layer_depth": 1}
NO_MLPS = {"head_layer_depth": 0, "merge_layer_depth": 0, "head_merge_bias": False, "head_merge_init": "normal"}

LATENT_16B = {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vocab_size": 102_400,
    "intermediate_size": 10_944,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 2 * 1408,
    "num_moe_heads": 1,
    "num_experts": 64,
    "num_experts_per_tok": 6,
}
LATENT_95B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 131_072,
    "intermediate_size": 2688,  # of no layer
    "gated_mlp": False,
    "hidden_act": "relu2",
    "moe_intermediate_size": 2688,
    "shared_expert_intermediate_size": 2 * 2688,
    "num_moe_heads": 1,
    "num_experts": 128,
    "num_experts_per_tok": 6,
}


def _latent_rows(name: str, smoe: dict[str, Any], accurate_top_k: int) -> dict[str, dict[str, Any]]:
    latent = {"moe_latent_size": smoe["hidden_size"] // 4, "router_input": "token"}
    eff = {**smoe, **latent, "num_experts": 4 * smoe["num_experts"]}
    return {
        f"{name}-smoe": smoe,
        f"{name}-eff": eff,
        f"{name}-acc": {**eff, "num_experts_per_tok": accurate_top_k},
    }


PRESETS: dict[str, dict[str, Any]] = {
    # P1, tables 1 and 11, figure 6
    **{f"p1-xmoe-{experts}": {**P1_XMOE, "num_experts": experts} for experts in P1_SIZES},
    **{
        f"p1-mhmoe-{experts}": {**P1_MHMOE, "num_experts": experts, "moe_intermediate_size": size}
        for experts, size in P1_SIZES.items()
    },
    "p1-dense": {**P1, **DENSE},
    # P1, table 5: heads, at the same number of parameters. Where 16 / h would leave the router one dimension, in which
    # cosines are only signs, it has the 16 of the authors' code.
    **{
        f"p1-mhmoe-8-head{heads}": {
            **P1_MHMOE,
            "num_experts": 8,
            "num_moe_heads": heads,
            "moe_intermediate_size": P1_SIZES[8] // 4 * heads,
            "router_dim": None if heads <= 8 else 16,
        }
        for heads in (2, 4, 6, 8, 12)
    },
    # P1, tables 6 and 7: no split, no MLPs (n = 0), more of them
    "p1-xmoe-8-mlp": {**P1_XMOE, "num_experts": 8, **MLPS, "head_merge_bias": True, "head_merge_init": "xavier"},
    "p1-mhmoe-8-mlp0": {**P1_MHMOE, "num_experts": 8, "moe_intermediate_size": P1_SIZES[8], **NO_MLPS},
    **{
        f"p1-mhmoe-8-mlp{depth}": {
            **P1_MHMOE,
            "num_experts": 8,
            "moe_intermediate_size": P1_SIZES[8],
            "head_layer_depth": depth,
            "merge_layer_depth": depth,
        }
        for depth in (1, 2, 3)
    },
    # P2, table 1: without shared expert, with one, each also in 1 bit
    **P2_ROWS,
    "p2-dense": {**P2, **DENSE},
    **{f"{name}-shared": {**row, **SHARED} for name, row in P2_ROWS.items()},
    **{f"{name}-1bit": {**row, **ONE_BIT} for name, row in P2_ROWS.items()},
    "p2-dense-1bit": {**P2, **DENSE, **ONE_BIT},
    **{f"{name}-shared-1bit": {**row, **SHARED, **ONE_BIT} for name, row in P2_ROWS.items()},
    # P2, table 5 (head=2) and its counterpart: the two layers in plain sparse MoE
    "p2-mhmoe-head2-neither": {**P2_ROWS["p2-mhmoe-head2"], **NO_MLPS},
    "p2-mhmoe-head2-head-only": {**P2_ROWS["p2-mhmoe-head2"], "merge_layer_depth": 0},
    "p2-mhmoe-head2-merge-only": {**P2_ROWS["p2-mhmoe-head2"], "head_layer_depth": 0},
    "p2-smoe-both": {**P2_ROWS["p2-smoe"], **MLPS, **XAVIER},
    "p2-fine-grained-both": {**P2_ROWS["p2-fine-grained"], **MLPS, **XAVIER},
    # LatentMoE, table 2
    **_latent_rows("latentmoe-16b", LATENT_16B, accurate_top_k=24),
    **_latent_rows("latentmoe-95b", LATENT_95B, accurate_top_k=22),  # which the active parameters of table 3 tell
}


def from_preset(cls: type[MHMoEConfig], name: str, **overrides) -> MHMoEConfig:
    """
    The config of a row in one of the papers' tables; `MHMoEConfig.from_preset`.

    With another `hidden_size` or `intermediate_size` (of the dense FFNs) the other sizes are solved again as the paper
    solved them, so that a set of presets stays comparable: P2's for the multiply-adds and parameters of 8 experts of
    the dense FFN's size, top-1; P1's and LatentMoE's in proportion. Attention heads keep their size, of 64 or 128.

    Args:
        name: a key of [`PRESETS`].
        **overrides: fields of the config, which go before everything that is said above.

    Raises:
        UserError: there is no such preset or no such field; the message names the nearest ones.
        ValueError: the fields are impossible together.
    """
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is not known; {_nearest(name, PRESETS)}")
    known = vars(cls())
    for field in overrides:
        if field not in known:
            raise UserError(f"{field}={overrides[field]!r}: MHMoEConfig has no such field; {_nearest(field, known)}")
    fields = dict(PRESETS[name])
    if overrides.keys() & {"hidden_size", "intermediate_size"}:
        fields.update(_resized(name, overrides))
    fields.update(overrides)
    if name.startswith(("p1-dense", "p2-dense")):
        fields.setdefault("mlp_only_layers", list(range(fields["num_hidden_layers"])))
    start = {"head_merge_bias", "head_merge_init"} - overrides.keys()
    without = {field: value for field, value in fields.items() if field not in start}
    return cls(**fields) if any(cls(**without).layer_depths) else cls(**without)  # overrides may leave the layers out


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`a=1,b=[2,3],c=gelu` as a dict, each value read as JSON where it is some."""
    overrides = {}
    for item in re.split(r",(?=\s*\w+\s*=)", text) if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals or not value:
            raise UserError(f"config_overrides={text!r}: {item!r} is not of the form field=value")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return overrides


def _resized(name: str, overrides: dict) -> dict[str, int]:
    for field in ("hidden_size", "intermediate_size"):
        if type(size := overrides.get(field, 1)) is not int or size < 1:
            raise ValueError(f"{field}={size!r} must be a positive integer.")
    preset = PRESETS[name]
    hidden_size = overrides.get("hidden_size", preset["hidden_size"])
    dense_size = overrides.get("intermediate_size") or nearest_multiple(
        preset["intermediate_size"] * hidden_size / preset["hidden_size"]
    )
    if name.startswith("latentmoe-"):
        return _in_proportion(preset, hidden_size, dense_size)
    sizes = {"intermediate_size": dense_size, "num_attention_heads": _attention_heads(hidden_size)}
    if "shared_expert_intermediate_size" in preset:
        sizes["shared_expert_intermediate_size"] = dense_size
    if preset["moe_intermediate_size"] == DENSE["moe_intermediate_size"]:
        return sizes
    if name.startswith("p1-"):
        proportion = preset["moe_intermediate_size"] / preset["intermediate_size"]
        return {**sizes, "moe_intermediate_size": nearest_multiple(proportion * dense_size)}
    fields: dict[str, Any] = {**preset, **sizes, **overrides}
    layer = MHMoEConfig(**fields)
    parity = match_smoe(
        hidden_size,
        layer.num_moe_heads,
        layer.num_experts_per_tok,
        reference_size=dense_size,
        matrices=layer.expert.matrices,
        latent_size=layer.moe_latent_size,
        private_experts=layer.private_experts,
    )
    return {
        **sizes,
        "moe_intermediate_size": parity.moe_intermediate_size,
        "num_experts": parity.num_experts,
    }


def _in_proportion(preset: dict[str, Any], hidden_size: int, dense_size: int) -> dict[str, int]:
    """LatentMoE's sizes, by the hidden size where they are a token's, by the FFN's where they are inner sizes."""
    heads = _attention_heads(hidden_size, preset["hidden_size"] // preset["num_attention_heads"])
    groups = preset["num_attention_heads"] // preset.get("num_key_value_heads", preset["num_attention_heads"])
    sizes = {"intermediate_size": dense_size, "num_attention_heads": heads}
    sizes["num_key_value_heads"] = heads // groups if heads % groups == 0 else heads
    for field in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        sizes[field] = max(nearest_multiple(preset[field] * dense_size / preset["intermediate_size"]), 8)
    if "moe_latent_size" in preset:
        sizes["moe_latent_size"] = max(preset["moe_latent_size"] * hidden_size // preset["hidden_size"], 1)
    return sizes


def _attention_heads(hidden_size: int, head_size: int = 64) -> int:
    return next(heads for heads in range(max(hidden_size // head_size, 1), 0, -1) if hidden_size % heads == 0)


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"the nearest are {', '.join(get_close_matches(name, known, n=3, cutoff=0))}"
