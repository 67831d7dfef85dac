"""Fine-tune a causal language model on packed text: everything behind `mhmoe train`."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from mhmoe.conversion.checkpoint import LICENSE_FILES, find_folder
from mhmoe.errors import UserError, one_line

from .card import write_trained_card
from .data import causal_batch, load_file, load_hub_split, pack
from .quality import TokenQuality, token_predictions
from .sharding import check_sharding, read_distributed_config, refusals_in_one_line
from .trainer import MHMoETrainer


Dtype = Literal["float32", "bfloat16", "auto"]


@dataclass
class TextArguments:
    """The text to train on, and how the model is loaded. The names are those of transformers' own examples."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt (one document), .json or .jsonl (one in each row), also compressed."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Text that perplexity and token accuracy are measured on; as train_file."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "In place of train_file, a data set on the Hub: its splits `train` and `validation`."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of dataset_name."})
    text_column: str = field(default="text", metadata={"help": "The field or column that holds the text."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Documents are put one after the other and cut to blocks of so many tokens; the last, incomplete "
            "one is dropped. Default: 1024, or max_position_embeddings if that is less."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first so many blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first so many blocks."})
    dtype: Dtype = field(
        default="float32",
        metadata={"help": "Of the weights while training and when saved; auto: as they are stored. See also --bf16."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flex_attention, ..."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "subtoken, grouped_mm, batched_mm or eager."}
    )
    distributed_config: str | None = field(
        default=None,
        metadata={
            "help": "How the launched processes share out the model: the fields of transformers' DistributedConfig, "
            'as JSON or in a JSON file. {"fsdp_size": 2} is FSDP2, tp_size tensor, ep_size expert parallelism.'
        },
    )
    output_router_logits: bool = field(
        default=True, metadata={"help": "Train with the load balancing loss, weighted by the model's own coefficient."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start anew in an output_dir that is not empty: its checkpoints are removed, files replaced."
        },
    )


def train(model: str, text: TextArguments, training_args: TrainingArguments) -> MHMoETrainer:
    """
    Fine-tune `model` on packed text, and save it with its tokenizer, card and licence in `training_args.output_dir`.
    With validation text, its quality is measured before, during (as `eval_strategy` says) and after training; the
    figures are in `trainer.state.log_history`, see [`measured`].

    Args:
        model: a folder, or an id on the Hub; MH-MoE or any other causal language model.
        text: what to train on.
        training_args: everything else, as for [`Trainer`]. Under torchrun or accelerate, every process calls this.

    Raises:
        UserError: the model, the text or the output folder cannot be used so.
    """
    folder, _ = find_folder(model)
    check_arguments(text, training_args)
    checkpoint = prepare_output(Path(training_args.output_dir), folder, text.overwrite, training_args)
    causal_lm, tokenizer = load_model(folder, text)
    block_size = choose_block_size(text.block_size, causal_lm.config.max_position_embeddings)
    with training_args.main_process_first(desc="packing the text"):  # the others find it in the cache of `datasets`
        train_blocks, validation_blocks = load_blocks(text, tokenizer, block_size)
    if validation_blocks is not None:
        training_args.eval_on_start = True
    elif training_args.eval_strategy != "no" or training_args.eval_on_start:
        raise UserError(
            f"eval_strategy={training_args.eval_strategy.value}: there is no text to evaluate on; give validation_file"
        )

    use_cache = causal_lm.config.use_cache
    with refusals_in_one_line(training_args):
        trainer = MHMoETrainer(
            model=causal_lm,
            args=training_args,
            train_dataset=train_blocks,
            eval_dataset=validation_blocks,
            data_collator=causal_batch,
            processing_class=tokenizer,
            compute_metrics=TokenQuality(),
            preprocess_logits_for_metrics=token_predictions,
            balance=text.output_router_logits,
        )
        check_sharding(trainer, checkpoint)
    run_trainer(trainer, checkpoint, text.overwrite)
    causal_lm.config.use_cache = use_cache  # Trainer turns it off, and would save it so
    steps_measured = [evaluation["step"] for evaluation in measured(trainer)]
    if validation_blocks is not None and (
        training_args.load_best_model_at_end or steps_measured[-1:] != [trainer.state.global_step]
    ):
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        output = Path(training_args.output_dir)
        write_trained_card(folder / "README.md", output, describe(trainer, text, block_size))
        for file in {file for pattern in LICENSE_FILES for file in folder.glob(pattern)}:
            shutil.copy(file, output)
    if training_args.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()
    return trainer


def run_trainer(trainer: MHMoETrainer, checkpoint: str | None, overwrite: bool) -> None:
    """Train, from `checkpoint` if there is one; what another run left in the output folder goes with `overwrite`."""
    if overwrite and checkpoint is None and trainer.is_world_process_zero():
        for stale in Path(trainer.args.output_dir).glob("checkpoint-*/"):
            shutil.rmtree(stale)
    trainer.train(resume_from_checkpoint=checkpoint)


def measured(trainer: MHMoETrainer) -> list[dict[str, float]]:
    """The evaluations of a run, from the first (before training) to the last, each with its `step`."""
    return [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]


def check_arguments(text: TextArguments, training_args: TrainingArguments) -> None:
    """Raise a [`UserError`] for what could not work, or would silently do something else."""
    if (text.train_file is None) == (text.dataset_name is None):
        given = "both" if text.train_file else "neither"
        raise UserError(f"train_file, dataset_name: {given} given; name the text to train on with one of them")
    for name in ("block_size", "max_train_samples", "max_eval_samples"):
        value, least = getattr(text, name), 2 if name == "block_size" else 1
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training_args.world_size == 1:
        way_out = (
            "let accelerate launch DeepSpeed, without --deepspeed" if training_args.deepspeed else "add --use_cpu"
        )
        raise UserError(
            f"WORLD_SIZE={launched} processes were launched, and each would train alone; on CPUs, {way_out}"
        )
    if training_args.label_smoothing_factor:
        raise UserError(
            f"label_smoothing_factor={training_args.label_smoothing_factor} is not supported: Trainer would not shift "
            "the labels of this model; leave it out"
        )
    if text.output_router_logits and (training_args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise UserError(
            "activation_checkpointing_kwargs: use_reentrant=true would lose the gradient of the load balancing loss; "
            "leave it out"
        )


def prepare_output(output: Path, source: Path | None, overwrite: bool, training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from, `None` to start anew.

    Raises:
        UserError: there is no such checkpoint, or `output` holds something that was not meant to be written over.
    """
    resume = training_args.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output}: a file; choose another folder")
    if source is not None and output.resolve() == source.resolve():
        raise UserError(f"output_dir={output}: holds the model to train; choose another folder")
    if resume:
        checkpoint = get_last_checkpoint(output) if resume.lower() == "true" and output.is_dir() else resume
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise UserError(
                f"resume_from_checkpoint={resume}: no checkpoint of Trainer; give its folder, or `true` for the last "
                f"one in output_dir={output}"
            )
        return checkpoint
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"output_dir={output}: is not empty; choose another folder, continue with --resume_from_checkpoint true, "
            "or --overwrite"
        )
    return None


def load_model(folder: Path, text: TextArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; a [`UserError`] if one of them cannot be loaded, or they do not fit each other."""
    options = {"dtype": text.dtype}
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(text, name) is not None:
            options[name] = getattr(text, name)
    if text.distributed_config is not None:
        options["distributed_config"] = read_distributed_config(text.distributed_config)
    try:
        AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded as a causal language model ({one_line(error)})") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} tensors of the model are not there, {missing[0]} for one")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no eos_token, which separates documents; set one")
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
    text: TextArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> tuple[Dataset, Dataset | None]:
    """Packed text to train on, and to validate on where there is some; a [`UserError`] if either fills no block."""

    def split(file: str | None, name: str) -> Dataset | None:
        if file is not None:
            return load_file(file, text.text_column)
        if text.dataset_name is not None:
            return load_hub_split(text.dataset_name, text.dataset_config_name, name, text.text_column)
        return None

    documents = split(text.train_file, "train")
    if documents is None:
        raise UserError(f"dataset_name={text.dataset_name}: has no split `train`")
    validation = split(text.validation_file, "validation")
    train_blocks = pack(documents, tokenizer, block_size, text.max_train_samples)
    if not len(train_blocks):
        raise UserError(f"block_size={block_size}: the text to train on does not fill one block; choose a smaller one")
    if validation is None:
        return train_blocks, None
    validation_blocks = pack(validation, tokenizer, block_size, text.max_eval_samples)
    if not len(validation_blocks):
        raise UserError(f"block_size={block_size}: the validation text does not fill one block; choose a smaller one")
    return train_blocks, validation_blocks


def describe(trainer: MHMoETrainer, text: TextArguments, block_size: int) -> list[str]:
    """The card's lines on a finished run."""
    args, state = trainer.args, trainer.state
    origin = text.dataset_name or Path(text.train_file).name
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lines = [
        f"Fine-tuned with `mhmoe train` on {origin}, for {state.global_step} steps of {rows_per_step} blocks of "
        f"{block_size} tokens: learning rate {args.learning_rate:g} ({args.lr_scheduler_type.value}), optimiser "
        f"{args.optim.value}, seed {args.seed}, load balancing loss {'on' if trainer.balance else 'off'}.",
    ]
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
