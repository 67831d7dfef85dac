"""`mhmoe verify`."""

from mhmoe.options import OptionParser

from .comparing import VerificationError
from .verify import keep_figures, verify


def parser() -> OptionParser:
    parser = OptionParser(
        "mhmoe verify", description="Compare a converted checkpoint with its source; fails if it misses its promise."
    )
    parser.add_argument("source", metavar="SOURCE", help="the dense checkpoint: folder, or id on the Hub")
    parser.add_argument("output", metavar="OUTPUT", help="the folder that mhmoe convert made")
    parser.add_argument(
        "--text", metavar="FILE", help="compare on this text (default: some paragraphs of the package)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="in which both models run (default: as OUTPUT is stored)",
    )
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of the text (default: %(default)s)")
    parser.add_argument(
        "--update-card", action="store_true", help="keep the figures in OUTPUT, on its card and in conversion.json"
    )
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that SOURCE's tokenizer brings, if it needs it"
    )
    return parser


def main(arguments: list[str]) -> None:
    options = vars(parser().parse_args(arguments))
    update_card = options.pop("update_card")
    verification = verify(**options)
    print(verification.table())
    if update_card:
        keep_figures(verification, options["output"])
    if verification.broken_promises:
        raise VerificationError(f"{options['output']}: {'; '.join(verification.broken_promises)}")
    print(f"{options['output']} keeps what strategy {verification.strategy} promises")
