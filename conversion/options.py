"""What a user can ask of a conversion: every field is an option of `mhmoe convert`, and some of `mhmoe plan` too."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mhmoe.errors import UserError
from mhmoe.model_cards import is_hub_id
from mhmoe.options import add_options, option

from .calibration import CALIBRATION_TOKENS
from .strategies import STRATEGIES


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Match = Literal["dense", "smoe"]
RouterInput = Literal["sub_token", "token", "latent"]
RouterInit = Literal["random", "kmeans"]


def strategies_help() -> str:
    return ". ".join(
        f"{name}{' (default)' if name == 'exact' else ''}: {of.summary}" for name, of in STRATEGIES.items()
    )


def size_help(field: str, meaning: str, default: str) -> str:
    """With the default, and those of strategies with another."""
    others = [f"; {name}: {of.defaults[field]}" for name, of in STRATEGIES.items() if field in of.defaults]
    return f"{meaning} (default: {default}{''.join(others)})"


def size(field: str, letter: str, meaning: str, default: str) -> Any:
    def help_text() -> str:
        return size_help(field, meaning, default)

    return option(None, help_text, letter, group="sizes", planned=True)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """
    The options of a conversion.

    Attributes:
        num_moe_heads: sub-tokens of a token; by default the largest of 4, 3, 2 that divides the hidden size, or what
            the strategy prefers.
        num_experts: routed experts per layer; by default 32.
        num_experts_per_tok: experts per sub-token.
        moe_intermediate_size: inner size of a routed expert; the default is in `conversion/sizes.py`.
        shared_expert_intermediate_size: inner size of the shared expert; by default what the strategy needs, which
            most strategies leave no choice in.
        match: "dense" solves the inner sizes for the dense FFN's multiply-adds. "smoe" solves inner size and number of
            routed experts for multiply-adds and parameters of a sparse MoE whose experts are as wide as the dense FFN
            (P2); a shared expert comes on top.
        reference_experts: of that sparse MoE.
        reference_top_k: of that sparse MoE, per token.
        strategy: what becomes of the dense FFNs: one of `STRATEGIES`, each described in its file in
            `conversion/strategies/`.
        moe_latent_size, private_experts, router_input: layers of papers after P2, as the config's fields of these
            names say.
        norm_topk_prob: whether the weights of a sub-token's experts are scaled to sum to one.
        calibration: text for a strategy that needs one and for `router_init`: a file, or several of which each has the
            same share of the tokens, and one that is named twice has two: see `conversion/calibration.py`.
        calibration_tokens: how much of it is used.
        router_init: the router's rows: "random", or "kmeans" for one balanced cluster of the calibration text's
            sub-tokens per expert.
        strategy_options: the options that only the chosen strategy has, by name.
        dtype: of the written tensors; "auto" keeps each as it is stored.
        max_shard_size: of a weight file, in bytes or as "5GB".
        seed: of the tensors that start random.
        revision: branch, tag or commit of the source on the Hub.
        trust_remote_code: run the code that the source's tokenizer brings, and copy it; without, its plain class is
            used, or the source refused.
        base_model: what the card names as base_model, an id on the Hub; by default that of the source or, for a
            folder, the one that its card or config names.
        overwrite: replace an existing output, and start afresh where a conversion was cut short.
        resume: finish what the same conversion left in `OUTPUT.partial` when it was killed; a failure then leaves it
            there again. The files are the same, to the byte, as those of an undisturbed run.

    Raises:
        UserError: a value is not one of its choices, or no id.
    """

    num_moe_heads: int | None = size("num_moe_heads", "H", "sub-tokens of a token", "4, 3 or 2, as hidden_size allows")
    num_experts: int | None = size("num_experts", "E", "routed experts per layer", "32")
    num_experts_per_tok: int = option(
        2, "experts that each sub-token is routed to (default: %(default)s)", "K", group="sizes", planned=True
    )
    moe_intermediate_size: int | None = size(
        "moe_intermediate_size", "I", "inner size of a routed expert", "intermediate_size / 4H, to a multiple of 8"
    )
    shared_expert_intermediate_size: int | None = size(
        "shared_expert_intermediate_size", "S", "inner size of the shared expert", "what the strategy needs"
    )
    moe_latent_size: int | None = size(
        "moe_latent_size", "L", "numbers of a token between head and merge layer", "hidden_size"
    )
    match: Match | None = option(
        None,
        "dense: solve I, or S where the strategy leaves it open, for the dense FFN's multiply-adds; "
        "smoe: solve I and E for multiply-adds and parameters of a sparse MoE with experts of the dense FFN's size",
        choices=get_args(Match),
        group="match",
        planned=True,
    )
    reference_experts: int = option(
        8, "of the sparse MoE of --match smoe (default: %(default)s)", "E", group="match", planned=True
    )
    reference_top_k: int = option(
        1, "of the sparse MoE of --match smoe (default: %(default)s)", "K", group="match", planned=True
    )
    strategy: str = option("exact", strategies_help, choices=STRATEGIES, group="strategy")
    private_experts: bool = option(
        False, "a router and E experts of its own for each head; E is then 32 / H", group="routing", planned=True
    )
    router_input: RouterInput | None = option(
        None,
        "what the router sees (default: sub_token)",
        choices=get_args(RouterInput),
        group="routing",
        planned=True,
    )
    norm_topk_prob: bool = option(True, "scale the weights of a sub-token's experts to sum to one", group="routing")
    calibration: str | Path | Sequence[str | Path] | None = option(
        None,
        "text for strategies that need one and for --router-init kmeans: .txt or .jsonl, or .zst of it; given several "
        "times, each text has the same share",
        "FILE",
        repeated=True,
        group="text",
    )
    calibration_tokens: int = option(
        CALIBRATION_TOKENS, "how much of it is used (default: %(default)s)", "N", group="text"
    )
    router_init: RouterInit = option(
        "random",
        "router rows; kmeans: a balanced cluster of the text's sub-tokens for each expert (default: %(default)s)",
        choices=get_args(RouterInit),
        group="text",
    )
    strategy_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Dtype = option(
        "auto",
        "of the written tensors (default: as they are stored)",
        choices=get_args(Dtype),
        group="files",
        planned=True,
    )
    max_shard_size: int | str = option("5GB", "of a weight file (default: %(default)s)", "SIZE", group="files")
    seed: int = option(0, "of what starts random (default: %(default)s)", group="files")
    revision: str | None = option(None, "branch, tag or commit of SOURCE on the Hub", group="files", planned=True)
    trust_remote_code: bool = option(
        False, "run and copy the code that SOURCE's tokenizer brings, if its plain class will not do", group="files"
    )
    base_model: str | None = option(
        None,
        "base_model on the card (default: SOURCE on the Hub, or what its card or config names)",
        "ID",
        group="card",
    )
    overwrite: bool = option(False, "replace OUTPUT if it is a model folder", group="output")
    resume: bool = option(
        False,
        "finish what the same command left in OUTPUT.partial when it was killed; a failure leaves it there again",
        group="output",
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value is not None and value not in choices:
                raise UserError(f"{field.name}={value!r} is unknown; choose one of {', '.join(choices)}")
        if self.base_model is not None and not is_hub_id(self.base_model):
            raise UserError(f"--base-model {self.base_model!r}: no id on the Hub; write it like OWNER/NAME")

    @property
    def calibration_files(self) -> list[Path]:
        """As often as each was named; none where there is no calibration text."""
        files = [] if self.calibration is None else self.calibration
        return [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]

    @classmethod
    def of(cls, **options: Any) -> "ConversionOptions":
        """
        From keywords, among which those of a strategy's own options may be.

        Raises:
            TypeError: neither a conversion nor any strategy has an option of that name.
            UserError: a value is not one of its choices.
        """
        own = {name: options.pop(name) for name in strategy_option_names() & options.keys()}
        return cls(**options, strategy_options=own)

    @classmethod
    def names(cls, group: str) -> list[str]:
        """Of the fields of one group: "sizes", "match", "strategy", "routing", "text", "files", "card" or "output"."""
        return [field.name for field in dataclasses.fields(cls) if field.metadata.get("group") == group]


def strategy_option_names() -> set[str]:
    """Of all strategies' own options."""
    return {field.name for strategy in STRATEGIES.values() for field in dataclasses.fields(strategy.Options)}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `mhmoe plan`."""
    planned = {field.name for field in dataclasses.fields(ConversionOptions) if field.metadata.get("planned")}
    add_options(parser, ConversionOptions, planned)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `mhmoe convert`, those of the strategies included."""
    add_options(parser, ConversionOptions)
    added: set[str] = set()  # strategies may share their options
    for name, strategy in STRATEGIES.items():
        own = {field.name for field in dataclasses.fields(strategy.Options)} - added
        if own:
            add_options(parser.add_argument_group(f"options of strategy {name}"), strategy.Options, own)
        added |= own
