"""`mhmoe convert`."""

import argparse
from typing import get_args

from mhmoe.errors import raise_on_usage_error

from .convert import Dtype, RouterInit, Strategy, convert
from .size_options import size_options
from .strategy import CALIBRATION_TOKENS


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mhmoe convert",
        description="Upcycle a dense checkpoint of the Llama family into MH-MoE, ready to upload.",
        parents=[size_options()],
    )
    raise_on_usage_error(parser)
    parser.add_argument("source", metavar="SOURCE", help="folder with a dense checkpoint, or its id on the Hub")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make")
    parser.add_argument(
        "--strategy",
        choices=get_args(Strategy),
        default="exact",
        help="exact (default): dense FFN as shared expert, merge layer at zero; logits stay equal to the bit. "
        "anchored: part of the dense neurons inside the experts, the others shared; logits equal up to rounding. "
        "calibrated: at the dense model's cost, fitted on --calibration FILE; logits near. "
        "random: all but the FFNs is copied, the experts start untrained",
    )
    parser.add_argument(
        "--norm-topk-prob",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scale the weights of a sub-token's experts to sum to one",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text for strategy calibrated and for --router-init kmeans: .txt or .jsonl, or .zst of it",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="how much of it is used (default: %(default)s)",
    )
    parser.add_argument(
        "--router-init",
        choices=get_args(RouterInit),
        default="random",
        help="router rows; kmeans: a balanced cluster of the text's sub-tokens for each expert (default: %(default)s)",
    )
    parser.add_argument(
        "--distillation-steps",
        type=int,
        default=60,
        metavar="N",
        help="of strategy calibrated, for each layer (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="auto", help="of the written tensors (default: as they are stored)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what starts random (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--base-model", metavar="ID", help="base_model on the card (default: SOURCE)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a model folder")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="finish what the same command left in OUTPUT.partial when it was killed; a failure leaves it there again",
    )
    return parser


def main(arguments: list[str]) -> None:
    output = convert(**vars(parser().parse_args(arguments)))
    print(f"{output}: ready to use and to upload; its README.md says how it was made")
