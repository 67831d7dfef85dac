"""The `mhmoe` command. Every subcommand is the `main(arguments)` of a module; this is the only place that exits."""

import importlib
import importlib.metadata
import os
import platform
import signal
import sys
from typing import NoReturn

from .errors import UserError, one_line, printable
from .files import REFUSALS
from .version import __version__


COMMANDS = {
    "params": ("mhmoe.params_command", "parameters and multiply-adds of the papers' models, or any"),
    "plan": ("mhmoe.conversion.plan_command", "say what converting would make and cost, from headers alone"),
    "convert": ("mhmoe.conversion.convert_command", "upcycle a dense Llama-style checkpoint into MH-MoE"),
    "verify": ("mhmoe.conversion.verify_command", "check a converted checkpoint against its source"),
    "eval": ("mhmoe.evaluation.eval_command", "run lm-eval tasks, with statistics of the routing"),
    "routing": ("mhmoe.evaluation.routing_command", "which experts the tokens of a text reach, in one or more models"),
    "pretrain": ("mhmoe.training.pretrain_command", "train one of the papers' models, or any, from random weights"),
    "compare": ("mhmoe.training.compare_command", "pre-train several models on the same text and compare them"),
    "train": ("mhmoe.training.train_command", "fine-tune with transformers' Trainer"),
    "serve": ("mhmoe.serve", "answer OpenAI's API with `transformers serve`, which then knows MH-MoE"),
}


def usage() -> str:
    lines = ["usage: mhmoe COMMAND ...   (mhmoe COMMAND --help shows its options, mhmoe --version the versions)", ""]
    return "\n".join(lines + [f"  {name:<9}{purpose}" for name, (_, purpose) in COMMANDS.items()])


def versions() -> str:
    """This package's version, and of what its results depend on most: from their metadata, nothing is imported."""
    others = []
    for package in ("transformers", "torch"):
        try:
            others.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            others.append(f"{package} not installed")
    return f"mhmoe {__version__} ({', '.join([*others, f'Python {platform.python_version()}'])})"


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command in ("-V", "--version"):
        print(versions())
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; choose one of {', '.join(COMMANDS)}")
        importlib.import_module(COMMANDS[command][0]).main(arguments)
        sys.stdout.flush()
    except UserError as error:
        # names of files and tensors may have lines of their own, and characters that mean something to a terminal
        sys.exit(f"mhmoe: error: {printable(one_line(error))}")
    except BrokenPipeError:  # who reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
        sys.exit(1)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        file = error.filename2 or error.filename
        place = printable(f"{file}: ") if file else ""
        sys.exit(f"mhmoe: error: {place}{REFUSALS[error.errno]} ({error.strerror})")
    except MemoryError:
        sys.exit("mhmoe: error: there is not enough memory; take a smaller model, shorter text or smaller batches")
    except KeyboardInterrupt:
        _end_of_signal("interrupted", signal.SIGINT)
    except Terminated:
        _end_of_signal("terminated", signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM, as an exception: it lets commands clean up after themselves."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _end_of_signal(what: str, number: signal.Signals) -> NoReturn:
    """End with one line and the code that shells give to a program that this signal ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends what Python does last at once, without a traceback
    print(f"mhmoe: {what}", file=sys.stderr, flush=True)
    sys.exit(128 + number)
