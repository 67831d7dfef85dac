"""`mhmoe routing`: which experts the tokens of a text reach, in one or more models."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mhmoe.errors import UserError
from mhmoe.files import check_writable, replacing, write_text, writing
from mhmoe.options import OptionParser

from .checks import check_device, check_model
from .model_types import MODEL_TYPES
from .routing_figure import save_routing_figure, times_chosen
from .tables import FIGURES, figures, table


if TYPE_CHECKING:  # --help should not wait for these
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


EPILOG = """\
examples:
  mhmoe routing path/to/model --text books.jsonl.zst
  mhmoe routing path/to/smoe path/to/mhmoe --text books.txt --max_tokens 100000 --output_path routing

With --output_path, routing.json there has every figure for each layer and expert, and routing.png the pictures.
"""
BLOCK_SIZE = 512


def parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        "mhmoe routing",
        description="Show which experts the tokens of a text reach: experts activated, different experts per token, "
        f"load balance. For MH-MoE and the plain sparse MoE of {', '.join(MODEL_TYPES[1:])}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="folder with a model, or its id on the Hub")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help=".txt or .jsonl (field text), also .gz, .zst, .bz2"
    )
    for flag, default, purpose in (
        ("--max_tokens", 20_000, "how much of the text is used, from its start"),
        ("--batch_size", 8, "rows at a time"),
        ("--min_count", 10, "how often a token must occur to be listed among those with most or fewest experts"),
        ("--num_extremes", 10, "how many of those are listed"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{purpose} (default: %(default)s)")
    parser.add_argument(
        "--block_size",
        type=int,
        metavar="N",
        help=f"tokens in a row, which see each other (default: {BLOCK_SIZE}, or what the model can take)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="X",
        help="an expert is activated if it is chosen more than X times per token (default: 0, at least once)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="in which the models run (default: as they are stored)",
    )
    parser.add_argument("--output_path", metavar="DIR", type=Path, help="where routing.json and routing.png go")
    parser.add_argument("--overwrite", action="store_true", help="replace these two files")
    return parser


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    from .routing_analysis import analyse_routing

    _check(options)
    # before the first model takes its time
    block_sizes = {model: _block_size(model, options.block_size) for model in options.models}
    names = [Path(model).resolve().name for model in options.models]
    if len(set(names)) < len(names):
        names = options.models
    settings = {name: getattr(options, name) for name in ("max_tokens", "min_count")}
    models = {}
    for name, model in zip(names, options.models, strict=True):
        loaded, tokenizer = _load(model, options.dtype, options.device)
        models[name] = analyse_routing(
            loaded,
            tokenizer,
            options.text,
            batch_size=options.batch_size,
            block_size=block_sizes[model],
            threshold=options.threshold,
            num_extremes=options.num_extremes,
            **settings,
        )
    print(_overview(models), _by_layer(models), *(_tokens(*item) for item in models.items()), sep="\n")
    if options.output_path:
        report = {
            "text": str(options.text),
            **settings,
            "models": [
                {"model": model, "block_size": block_sizes[model], **routing}
                for model, routing in zip(options.models, models.values(), strict=True)
            ],
        }
        _save(report, models, options.output_path)


def _check(options: argparse.Namespace) -> None:
    for name in ("max_tokens", "batch_size", "block_size", "min_count", "num_extremes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if not options.threshold >= 0:
        raise UserError(f"--threshold {options.threshold}: give 0 or more selections per token")
    if len(set(options.models)) < len(options.models):
        raise UserError(f"{' '.join(options.models)}: name each model once")
    for model in options.models:
        check_model(model)
    if options.output_path:
        check_writable(f"--output_path {options.output_path}", options.output_path)
        for file in _files(options.output_path):
            if file.exists() and not options.overwrite:
                raise UserError(f"{file}: exists already; give another --output_path, or --overwrite")
    from mhmoe.text import text_format

    text_format(options.text)
    import torch

    if not options.device:
        # torch names the accelerator that it was built for even where there is none, or no driver
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        options.device = str(found)
    check_device("--device", options.device)


def _block_size(model: str, wanted: int | None) -> int:
    config = _config(model)
    longest = config.max_position_embeddings
    if wanted is not None and wanted > longest:
        raise UserError(f"--block_size {wanted}: {model} takes at most max_position_embeddings={longest} tokens")
    return wanted or min(BLOCK_SIZE, longest)


def _config(model: str) -> "PreTrainedConfig":
    from mhmoe.loading import load_config
    from mhmoe.sources import find_folder

    config = load_config(find_folder(model, weights=False)[0], model)
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{model}: model_type={config.model_type!r} has no routers that can be read here; give a model of "
            f"{', '.join(MODEL_TYPES)}"
        )
    return config


def _load(model: str, dtype: str, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from mhmoe.loading import load_causal_lm
    from mhmoe.sources import find_folder

    loaded, tokenizer, missing = load_causal_lm(find_folder(model)[0], dtype=dtype)
    if missing := sorted(set(missing) - {"lm_head.weight"}):  # which is not used here
        raise UserError(f"{model}: its weights lack {missing[0]}, which would be random")
    return loaded.to(device).eval(), tokenizer


def _overview(models: dict[str, dict]) -> str:
    sizes = {
        "heads": lambda routing: routing["num_moe_heads"],
        "experts": lambda routing: routing["num_experts"],
        "top k": lambda routing: routing["num_experts_per_tok"],
        "MoE layers": lambda routing: len(routing["layers"]),
    }
    activated, *others = FIGURES
    headers = ["Routing", *sizes, f"{activated} ({times_chosen(next(iter(models.values())))})", *others, "tokens"]
    rows = [
        [name, *(size(routing) for size in sizes.values()), *figures(routing), f"{routing['num_tokens']:,}"]
        for name, routing in models.items()
    ]
    return table(headers, rows)


def _by_layer(models: dict[str, dict]) -> str:
    """The same figures layer by layer, the models side by side."""
    layers = {name: {layer["layer"]: layer for layer in routing["layers"]} for name, routing in models.items()}
    nothing = [""] * len(FIGURES)
    rows = [
        [index, *(cell for own in layers.values() for cell in (figures(own[index]) if index in own else nothing))]
        for index in sorted({index for own in layers.values() for index in own})
    ]
    activated, *others = FIGURES
    return table(["Layer", *(header for name in models for header in (f"{name}: {activated}", *others))], rows)


def _tokens(name: str, routing: dict) -> str:
    def show(entry: dict) -> list[str]:
        return [f"`{repr(entry['token'])[1:-1]}`", f"{entry['experts_per_token']:.2f}", f"{entry['count']:,}"]

    tokens = routing["tokens"]
    rows = [[*show(most), *show(fewest)] for most, fewest in zip(tokens["most"], tokens["fewest"], strict=True)]
    headers = [f"{name}: most", "experts", "count", "fewest", "experts", "count"]
    return table(headers, rows)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / "routing.json", folder / "routing.png"


def _save(report: dict, models: dict[str, dict], folder: Path) -> None:
    json_file, figure_file = _files(folder)
    with writing(folder, "mend that, or give another --output_path"), replacing(figure_file) as unfinished:
        folder.mkdir(parents=True, exist_ok=True)
        save_routing_figure(models, unfinished)
        write_text(json_file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json_file, figure_file, sep="\n")
