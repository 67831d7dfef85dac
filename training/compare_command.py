"""`mhmoe compare`."""

from pathlib import Path

import torch

from mhmoe.errors import UserError
from mhmoe.options import OptionParser

from .compare import compare
from .comparison import table
from .memory import keep_memory


def parser() -> OptionParser:
    parser = OptionParser(
        "mhmoe compare",
        description="Pre-train several models on the same text, in the same order, and compare their perplexity. All "
        "other arguments are those of mhmoe pretrain and hold for every run. The same command goes on with a set that "
        "was cut short. Every option can be written with _ or with -.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="MODEL", help="presets, or folders with a config.json"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER")
    return parser


def main(arguments: list[str]) -> None:
    options, others = parser().parse_known_args(arguments)
    if not torch.accelerator.is_available():
        keep_memory()
    summary, failures = compare(options.models, options.seeds, options.output_dir, others)
    print(table(summary))
    print(f"{options.output_dir}: comparison.md, comparison.png, comparison.json, and a folder for each run")
    if failures:
        (name, reason), *others = failures.items()
        more = f", and {len(others)} more" if others else ""
        raise UserError(f"failed: {name} ({reason}){more}; the same command tries them again")
