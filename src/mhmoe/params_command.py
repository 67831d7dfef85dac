"""`mhmoe params`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .encoders.families import TYPE_PREFIX
from .errors import UserError, one_line
from .options import OptionParser


if TYPE_CHECKING:  # --help should not wait for it
    from mhmoe.configuration import Costs


def parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "mhmoe params",
        description="Parameters and multiply-adds a token, from configs alone. FFNs are all dense FFNs, experts, head "
        "and merge layers; routers are left out of them, as in the papers. Ratios are to the first model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="presets, folders with a config.json, ids on the Hub (default: all presets)",
    )
    parser.add_argument("--paper", type=int, choices=(1, 2), help="all presets of one paper")
    parser.add_argument(
        "--config_overrides", metavar="FIELD=VALUE,...", help="for the presets, as hidden_size=192,num_hidden_layers=4"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.models and options.paper:
        raise UserError(
            f"--paper {options.paper}: names the models, and so does {options.models[0]}; give one of both"
        )
    from mhmoe.configuration import PRESETS, parse_overrides

    overrides = parse_overrides(options.config_overrides)
    models = options.models or [
        name for name in PRESETS if name.startswith(f"p{options.paper}" if options.paper else "")
    ]
    counted = {name: count(name, overrides) for name in models}
    print(json.dumps({name: vars(row) for name, row in counted.items()}, indent=2) if options.json else table(counted))


def count(model: str, overrides: dict[str, Any]) -> "Costs":
    """Of a preset, a folder or a model on the Hub; a [`UserError`] where it is none or is not counted."""
    from .configuration import PRESETS, MHMoEConfig, costs
    from .loading import load_config
    from .sources import find_folder

    if model in PRESETS or not (Path(model).exists() or "/" in model):
        try:
            return costs(MHMoEConfig.from_preset(model, **overrides))
        except UserError:
            raise
        except Exception as error:  # of the config, whose checks raise several kinds
            raise UserError(f"preset={model}: {one_line(error)}") from error
    if overrides:
        raise UserError(f"config_overrides: for presets, and {model} is none; leave them out")
    config = load_config(find_folder(model, weights=False)[0], model)
    if config.model_type.startswith(TYPE_PREFIX):
        return count_encoder(config)
    try:
        return costs(config)
    except AttributeError as error:
        raise UserError(f"{model}: a {config.model_type} is not Llama-style, and not counted") from error


def count_encoder(config: Any) -> "Costs":
    """Of the model that the config names; of the bare one where it names none."""
    from transformers.models.auto import modeling_auto

    from .encoders.costs import encoder_costs, on_meta
    from .encoders.modeling_mhmoe_encoders import model_class

    named = (config.architectures or [modeling_auto.MODEL_MAPPING_NAMES[config.model_type]])[0]
    try:
        return encoder_costs(on_meta(model_class(str(named)), config))
    except Exception as error:
        raise UserError(f"architectures={named!r}: cannot be counted ({one_line(error)})") from error


def table(counted: "dict[str, Costs]") -> str:
    rows = [["", "parameters", "active", "experts", "others", "in FFNs", "ratio", "FFN multiply-adds", "ratio"]]
    first = next(iter(counted.values()))
    for name, row in counted.items():
        rows.append(
            [
                name,
                f"{row.parameters:,}",
                f"{row.active_parameters:,}",
                f"{row.expert_parameters:,}",
                f"{row.parameters - row.expert_parameters:,}",
                f"{row.ffn_parameters:,}",
                f"{row.ffn_parameters / first.ffn_parameters:.3f}",
                f"{row.ffn_multiply_adds:,}",
                f"{row.ffn_multiply_adds / first.ffn_multiply_adds:.3f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(lines)
