"""`mhmoe plan`."""

import json

from mhmoe.options import OptionParser

from .layout_plan import LayoutPlan, add_layout_options, is_mhmoe, layout_options, plan_layouts
from .options import add_plan_options
from .plan import Plan, plan


def parser() -> OptionParser:
    parser = OptionParser(
        "mhmoe plan",
        description="Say what converting would make and cost, and which layouts on several GPUs fit; reads config and "
        "headers, no weights.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder with a dense checkpoint or its config alone, or an id on the Hub; with --gpus, MH-MoE's too",
    )
    add_plan_options(parser)
    add_layout_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def main(arguments: list[str]) -> None:
    options = vars(parser().parse_args(arguments))
    as_json, layout = options.pop("json"), layout_options(options)
    plans: dict[str, Plan | LayoutPlan] = {}
    if layout.gpus is None or not is_mhmoe(options["source"], options.get("revision")):
        plans["conversion"] = plan(**options)
    if layout.gpus is not None:
        plans["layouts"] = plan_layouts(layout=layout, **options)
    if as_json:
        described = {name: planned.as_dict() for name, planned in plans.items()}
        print(json.dumps(described if "layouts" in plans else described["conversion"], indent=2))
    else:
        print("\n\n".join(planned.table() for planned in plans.values()))
