"""Fine-tune a causal language model on packed text: everything behind `mhmoe train`."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from mhmoe.errors import UserError
from mhmoe.loading import load_causal_lm
from mhmoe.model_cards import markdown
from mhmoe.sources import find_folder, refuse_adapter

from .arguments import PretrainArguments, TrainArguments
from .card import write_trained_card
from .data import load_file, load_hub_split, pack, stream_files
from .narrowing import narrowing
from .run import copy_licenses, measured, prepare_output, push, run_trainer, surviving
from .sharding import read_distributed_config
from .streaming import TextStream, stream_of
from .teacher import check_distillation, load_teacher
from .trainer import MHMoETrainer


# what a model can be the best by, and whether more of it is better
BEST_BY = {"loss": False, "perplexity": False, "cross_entropy": False, "token_accuracy": True}
MOST_STEPS = 10**8


def train(model: str, arguments: TrainArguments, training_args: TrainingArguments) -> MHMoETrainer:
    """
    Fine-tune `model` on packed text, and save it with its tokenizer, card and licence in `training_args.output_dir`.
    With validation text, its quality is measured before, during (as `eval_strategy` says) and after training; the
    figures are in `trainer.state.log_history`, see [`measured`].

    Args:
        model: a folder, or an id on the Hub; MH-MoE or any other causal language model.
        arguments: what to train on, and how.
        training_args: everything else, as for [`Trainer`]. Under torchrun or accelerate, every process calls this.

    Raises:
        UserError: the model, the text or the output folder cannot be used so, or what was saved could not be pushed.
    """
    check_arguments(arguments, training_args)
    check_distillation(arguments, training_args.deepspeed)
    folder, _ = find_folder(model)
    output = Path(training_args.output_dir)  # ty: ignore[invalid-argument-type]: never None
    checkpoint = prepare_output(output, folder, arguments.overwrite, training_args)
    causal_lm, tokenizer = load_model(folder, arguments)
    callbacks = narrowing(arguments, causal_lm, training_args, arguments.distributed_config is not None)
    teacher = load_teacher(arguments, tokenizer, causal_lm)
    block_size = choose_block_size(arguments.block_size, causal_lm.config.max_position_embeddings)
    with training_args.main_process_first(desc="packing the text"):  # the others find it in the cache of `datasets`
        train_blocks, validation_blocks = load_blocks(arguments, tokenizer, block_size, training_args)
    if validation_blocks is not None:
        training_args.eval_on_start = True
    elif training_args.eval_strategy != "no" or training_args.eval_on_start:
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise UserError(f"eval_strategy={strategy}: there is no text to evaluate on; give validation_file")
    trainer = run_trainer(
        causal_lm,
        tokenizer,
        train_blocks,
        validation_blocks,
        arguments,
        training_args,
        checkpoint,
        callbacks=callbacks,
        teacher=teacher,
    )
    if trainer.is_world_process_zero():
        with surviving(f"{output / 'README.md'}: was not written"):
            write_trained_card(folder / "README.md", output, describe(trainer, arguments, block_size))
        copy_licenses(folder, output)
    push(trainer)
    return trainer


def check_arguments(text: TrainArguments | PretrainArguments, training_args: TrainingArguments) -> None:
    """Raise a [`UserError`] for what could not work, or would silently do something else."""
    if (text.train_file is None) == (text.dataset_name is None):
        given = "both" if text.train_file else "neither"
        raise UserError(f"train_file, dataset_name: {given} given; name the text to train on with one of them")
    for name in ("block_size", "max_train_samples", "max_eval_samples", "shuffle_buffer_size"):
        value, least = getattr(text, name, None), 2 if name == "block_size" else 1
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(training_args, name)) < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if training_args.max_steps > MOST_STEPS:
        raise UserError(f"max_steps={training_args.max_steps} is more than any run has; give at most {MOST_STEPS:,}")
    if not 0 <= training_args.seed < 2**32:
        raise UserError(f"seed={training_args.seed} must be at least 0 and below 2**32")
    for name in ("eval_steps", "save_steps", "logging_steps"):
        if (getattr(training_args, name) or 0) < 0:
            raise UserError(f"{name}={getattr(training_args, name):g} must not be negative")
    if not training_args.eval_do_concat_batches:
        raise UserError("eval_do_concat_batches=False: perplexity is of all batches together; leave it out")
    _check_metric(training_args)
    _check_streaming(text, training_args)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training_args.world_size == 1:
        way_out = "leave out --deepspeed and let accelerate launch it" if training_args.deepspeed else "add --use_cpu"
        raise UserError(
            f"WORLD_SIZE={launched} processes were launched, and each would train alone; on CPUs, {way_out}"
        )
    name = "activation_checkpointing_kwargs"  # before transformers 5.23, gradient_checkpointing_kwargs
    name = name if hasattr(training_args, name) else "gradient_checkpointing_kwargs"
    if text.output_router_logits and (getattr(training_args, name) or {}).get("use_reentrant"):
        raise UserError(f"{name}: use_reentrant=true would lose the gradient of the load balancing loss; leave it out")


def _check_streaming(text: TrainArguments | PretrainArguments, training_args: TrainingArguments) -> None:
    if not text.streaming:
        if text.shuffle_buffer_size is not None:
            raise UserError(f"shuffle_buffer_size={text.shuffle_buffer_size}: is for --streaming; give that too")
        return
    if training_args.max_steps <= 0 and getattr(text, "num_train_tokens", None) is None:
        raise UserError("max_steps: not given, and --streaming does not know where the text ends; say how many steps")
    for name, instead in (
        ("max_train_samples", "max_steps says how much is read"),
        ("document_characters", "shuffle_buffer_size mixes the text"),
    ):
        if (value := getattr(text, name, None)) is not None:
            raise UserError(f"{name}={value}: not with --streaming; leave it out, {instead}")


def _check_metric(training_args: TrainingArguments) -> None:
    if training_args.metric_for_best_model is None:
        return
    name = training_args.metric_for_best_model.removeprefix("eval_")
    if name not in BEST_BY:
        raise UserError(
            f"metric_for_best_model={training_args.metric_for_best_model}: is not measured; choose one of "
            f"{', '.join(BEST_BY)}"
        )
    training_args.greater_is_better = BEST_BY[name]  # Trainer takes all but a loss to be better the greater it is


def load_model(folder: Path, arguments: TrainArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; a [`UserError`] if one of them cannot be loaded, or they do not fit each other."""
    refuse_adapter(folder)
    config = None if arguments.distributed_config is None else read_distributed_config(arguments.distributed_config)
    model, tokenizer, missing = load_causal_lm(folder, **arguments.loading(), distributed_config=config)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors of the model are not there, {missing[0]} for one")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no eos_token, which separates documents; set one")
    # ty: ignore[unsupported-operator]: a number
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the model only vocab_size="
            f"{model.get_input_embeddings().num_embeddings}; they do not belong together"
        )
    return model, tokenizer


def choose_block_size(block_size: int | None, max_position_embeddings: int) -> int:
    """`block_size`, or what it defaults to; a [`UserError`] if the model has not that many positions."""
    if block_size is None:
        return min(1024, max_position_embeddings)
    if block_size > max_position_embeddings:
        raise UserError(
            f"block_size={block_size} is more than the model's max_position_embeddings={max_position_embeddings}; "
            "choose a smaller one"
        )
    return block_size


def load_blocks(
    text: TrainArguments, tokenizer: PreTrainedTokenizerBase, block_size: int, training_args: TrainingArguments
) -> tuple[Dataset | TextStream, Dataset | None]:
    """Packed text to train on, and to validate on where there is some; a [`UserError`] if either fills no block."""
    validation_blocks = None
    if (validation := _validation_documents(text)) is not None:
        validation_blocks = pack(validation, tokenizer, block_size, text.max_eval_samples)
        if not len(validation_blocks):
            raise UserError(
                f"block_size={block_size}: the validation text does not fill one block; choose a smaller one"
            )
    documents = _train_documents(text)
    if text.streaming:
        return stream_of([documents], text, training_args, tokenizer, block_size), validation_blocks
    train_blocks = pack(documents, tokenizer, block_size, text.max_train_samples)
    if not len(train_blocks):
        raise UserError(f"block_size={block_size}: the text to train on does not fill one block; choose a smaller one")
    return train_blocks, validation_blocks


def _train_documents(text: TrainArguments) -> Any:
    if text.dataset_name is None:
        files = text.train_file or []
        if text.streaming:
            return stream_files(files, text.text_column)
        return concatenate_datasets([load_file(file, text.text_column) for file in files])
    documents = load_hub_split(
        text.dataset_name, text.dataset_config_name, "train", text.text_column, streaming=text.streaming
    )
    if documents is None:
        raise UserError(f"dataset_name={text.dataset_name}: has no split `train`")
    return documents


def _validation_documents(text: TrainArguments) -> Dataset | None:
    if text.validation_file is not None:
        return load_file(text.validation_file, text.text_column)
    if text.dataset_name is not None:
        return load_hub_split(text.dataset_name, text.dataset_config_name, "validation", text.text_column)
    return None


def describe(trainer: MHMoETrainer, text: TrainArguments, block_size: int) -> list[str]:
    """The card's lines on a finished run."""
    args, state = trainer.args, trainer.state
    names = [text.dataset_name] if text.dataset_name else text.train_file or []
    origin = ", ".join(markdown.code(Path(name).name if Path(name).exists() else name) for name in names)
    scheduler, optimizer = SchedulerType(args.lr_scheduler_type).value, OptimizerNames(args.optim).value
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lines = [
        f"Fine-tuned with `mhmoe train` on {origin}, for {state.global_step} steps of {rows_per_step} blocks of "
        f"{block_size} tokens: learning rate {args.learning_rate:g} ({scheduler}), optimiser "
        f"{optimizer}, seed {args.seed}, load balancing loss {'on' if trainer.balance else 'off'}.",
    ]
    if text.teacher is not None:
        lines[0] += (
            f" Distilled from {markdown.code(Path(text.teacher).name)}: {text.distillation_weight:g} of the loss is "
            f"the divergence from its logits at temperature {text.distillation_temperature:g}."
        )
    if text.shared_expert_intermediate_size is not None:
        lines[0] += (
            f" Its shared experts lost neurons in the first {text.narrowing_share:.0%} of the steps, until "
            f"{text.shared_expert_intermediate_size:,} were left."
        )
    if evaluations := measured(trainer):
        before, after = evaluations[0], evaluations[-1]
        lines += [
            "",
            f"| on {after['eval_tokens']:,} tokens of validation text | before | after |",
            "|---|---:|---:|",
            f"| perplexity | {before['eval_perplexity']:.3f} | {after['eval_perplexity']:.3f} |",
            f"| token accuracy | {before['eval_token_accuracy']:.4f} | {after['eval_token_accuracy']:.4f} |",
        ]
    return lines
