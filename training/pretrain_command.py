"""`mhmoe pretrain`."""

from datasets import disable_progress_bars

from .arguments import PretrainArguments, TrainerParser
from .memory import keep_memory
from .pretrain import pretrain
from .run import measured
from .sharding import device_defaults


# those of both papers where they give any; the rest suits runs of any length
DEFAULTS = {
    "learning_rate": 5e-4,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,  # below 1: of all steps
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 1,
    "logging_steps": 10,
}


def parser(prog: str = "mhmoe pretrain") -> TrainerParser:
    parser = TrainerParser(
        PretrainArguments,
        prog,
        f"{prog} --preset NAME --vocab_size N --train_file FILE --num_train_tokens N --output_dir FOLDER [option ...]",
        "Train a causal language model from random weights with transformers' Trainer, and all its arguments. Every "
        "option can be written with _ or with -.",
        instead={"max_train_samples": "num_train_tokens"},
    )
    parser.set_defaults(**DEFAULTS, **device_defaults())
    return parser


def main(arguments: list[str]) -> None:
    pretraining, training_args, _ = parser().parse(arguments)
    if training_args.disable_tqdm:
        disable_progress_bars()
    if training_args.device.type == "cpu":
        keep_memory()
    trainer = pretrain(pretraining, training_args)
    if not trainer.is_world_process_zero():
        return
    before, after = measured(trainer)[0], measured(trainer)[-1]
    print(
        f"perplexity {before['eval_perplexity']:.4f} before, {after['eval_perplexity']:.4f} after, "
        f"on {after['eval_tokens']:,} tokens of validation text"
    )
    print(f"{training_args.output_dir}: the model after {trainer.state.global_step} steps, ready to use and to upload")
