"""`mhmoe plan`."""

import json

from mhmoe.options import OptionParser

from .options import add_plan_options
from .plan import plan


def parser() -> OptionParser:
    parser = OptionParser(
        "mhmoe plan", description="Say what converting would make and cost; reads config and headers, no weights."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder with a dense checkpoint, or its id on the Hub")
    add_plan_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def main(arguments: list[str]) -> None:
    options = vars(parser().parse_args(arguments))
    as_json = options.pop("json")
    planned = plan(**options)
    print(json.dumps(planned.as_dict(), indent=2) if as_json else planned.table())
