"""`mhmoe plan`."""

import argparse
import json
from typing import get_args

from mhmoe.errors import raise_on_usage_error

from .plan import Match, plan
from .size_options import size_options


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mhmoe plan",
        description="Say what converting would make and cost; reads config and headers, no weights.",
        parents=[size_options()],
    )
    raise_on_usage_error(parser)
    parser.add_argument("source", metavar="SOURCE", help="folder with a dense checkpoint, or its id on the Hub")
    parser.add_argument(
        "--match",
        choices=get_args(Match),
        help="dense: solve I, or S if it is not given, for the dense FFN's multiply-adds; "
        "smoe: solve I and E for multiply-adds and parameters of a sparse MoE with experts of the dense FFN's size",
    )
    parser.add_argument(
        "--reference-experts", type=int, default=8, metavar="E", help="of the sparse MoE (default: %(default)s)"
    )
    parser.add_argument(
        "--reference-top-k", type=int, default=1, metavar="K", help="of the sparse MoE (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def main(arguments: list[str]) -> None:
    options = vars(parser().parse_args(arguments))
    as_json = options.pop("json")
    planned = plan(**options)
    print(json.dumps(planned.as_dict(), indent=2) if as_json else planned.table())
