"""`mhmoe train`."""

from datasets import disable_progress_bars

from .arguments import TrainArguments, TrainerParser
from .memory import keep_memory
from .run import measured
from .sharding import device_defaults
from .train import train


def parser() -> TrainerParser:
    parser = TrainerParser(
        TrainArguments,
        "mhmoe train",
        "mhmoe train MODEL --train_file FILE --output_dir FOLDER [option ...]",
        "Fine-tune a causal language model on text with transformers' Trainer, and all its arguments. Every option "
        "can be written with _ or with -.",
    )
    # Trainer's own 500 logging_steps would leave short runs without a line
    parser.set_defaults(logging_steps=10, **device_defaults())
    parser.add_argument("model", metavar="MODEL", help="folder with the model to start from, or its id on the Hub")
    return parser


def main(arguments: list[str]) -> None:
    train_arguments, training_args, positional = parse(arguments)
    if training_args.disable_tqdm:
        disable_progress_bars()
    if training_args.device.type == "cpu":
        keep_memory()
    trainer = train(positional.model, train_arguments, training_args)
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
    return parser().parse(arguments)
