"""`mhmoe train`."""

import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments

from mhmoe.errors import UserError, one_line, raise_on_usage_error

from .train import TextArguments, measured, train


def parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        [TextArguments, TrainingArguments],
        prog="mhmoe train",
        description="Fine-tune a causal language model on text with transformers' Trainer, and all its arguments.",
        allow_abbrev=False,
    )
    raise_on_usage_error(parser)
    parser.set_defaults(logging_steps=10)  # Trainer's own 500 would leave short runs without a line
    if not torch.accelerator.is_available():  # without these, processes launched on CPUs would each train alone
        deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")  # which knows CPUs by the backend alone
        parser.set_defaults(**{"ddp_backend": "gloo"} if deepspeed else {"use_cpu": True})
    parser.add_argument("model", metavar="MODEL", help="folder with the model to start from, or its id on the Hub")
    return parser


def main(arguments: list[str]) -> None:
    text, training_args, positional = parse(arguments)
    trainer = train(positional.model, text, training_args)
    if not trainer.is_world_process_zero():
        return
    if evaluations := measured(trainer):
        before, after = evaluations[0], evaluations[-1]
        print(f"perplexity {before['eval_perplexity']:.4f} before, {after['eval_perplexity']:.4f} after")
        print(f"token accuracy {before['eval_token_accuracy']:.4f} before, {after['eval_token_accuracy']:.4f} after")
        print(f"on {after['eval_tokens']:,} tokens of validation text")
    else:
        print("perplexity was not measured: there is no validation text (--validation_file)")
    print(f"{training_args.output_dir}: the model after {trainer.state.global_step} steps, ready to use and to upload")


def parse(arguments: list[str]):
    return parse_dataclasses(parser(), arguments)


def parse_dataclasses(parser: HfArgumentParser, arguments: list[str]):
    """What the parser makes of the arguments; every mistake is a [`UserError`]."""
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # of TrainingArguments, about its own fields
        raise UserError(one_line(error)) from error
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see {parser.prog} --help")
    return parsed
