"""The sizes of an MH-MoE model as options, which `mhmoe convert` and `mhmoe plan` share."""

import argparse


def size_options() -> argparse.ArgumentParser:
    """A parent parser with one option for every size; what is not given does not appear in the namespace."""
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag, letter, purpose in (
        ("--num-moe-heads", "H", "sub-tokens of a token (default: 4, 3 or 2, as hidden_size allows; calibrated: 8)"),
        ("--num-experts", "E", "routed experts per layer (default: 32)"),
        ("--num-experts-per-tok", "K", "experts that each sub-token is routed to (default: 2)"),
        (
            "--moe-intermediate-size",
            "I",
            "inner size of a routed expert (default: intermediate_size / 4H, to a multiple of 8; calibrated: "
            "hidden_size / H)",
        ),
        (
            "--shared-expert-intermediate-size",
            "S",
            "inner size of the shared expert (default: what the strategy needs; random: none)",
        ),
    ):
        options.add_argument(flag, type=int, metavar=letter, help=purpose)
    return options
