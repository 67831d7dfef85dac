"""`mhmoe convert`."""

from mhmoe.options import OptionParser

from .convert import convert
from .options import add_convert_options


def parser() -> OptionParser:
    parser = OptionParser(
        "mhmoe convert", description="Upcycle a dense checkpoint of the Llama family into MH-MoE, ready to upload."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder with a dense checkpoint, or its id on the Hub")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make")
    add_convert_options(parser)
    return parser


def main(arguments: list[str]) -> None:
    output = convert(**vars(parser().parse_args(arguments)))
    print(f"{output}: ready to use and to upload; its README.md says how it was made")
