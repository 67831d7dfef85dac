"""Pre-train a model from random weights on packed text: everything behind `mhmoe pretrain`."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mhmoe.configuration import MHMoEConfig, costs, parse_overrides
from mhmoe.errors import UserError, one_line

from .card import write_pretrained_card
from .data import causal_batch, load_file, load_hub_split
from .quality import TokenQuality, token_predictions
from .rows import pack_in_shares, shuffled_pieces, train_tokenizer
from .sharding import check_sharding, refusals_in_one_line
from .train import TextArguments, check_arguments, measured, prepare_output, run_trainer
from .trainer import MHMoETrainer


REPORT = "pretraining.json"
HELD_OUT_ROWS = 128


@dataclass
class PretrainArguments(TextArguments):
    """The model, its tokenizer and the text to train on."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt (one document), .json or .jsonl (one in each row), also compressed. Of "
            "several files each gets an equal share of the tokens, whatever its size."
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text that perplexity is measured on, as train_file. Default: the first blocks of train_file, "
            "which then are not trained on."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Blocks to measure perplexity on, spread evenly over validation_file (default: all of it), or "
            f"kept from train_file (default: {HELD_OUT_ROWS})."
        },
    )
    document_characters: int | None = field(
        default=None,
        metadata={
            "help": "Cut the documents to train on into pieces of so many characters, shuffled: a short run then sees "
            "something of every book, and not the first few books."
        },
    )
    preset: str | None = field(
        default=None, metadata={"help": "A model of the papers' tables, such as p2-mhmoe-head3; see mhmoe params."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "In place of preset, a folder with a config.json, or an id on the Hub."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of the config, as hidden_size=192,num_hidden_layers=4; a preset's inner sizes are solved "
            "again for another hidden_size."
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder with a tokenizer, or its Hub id."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "In place of tokenizer_name: train a byte-level BPE of so many tokens on the text."},
    )
    num_train_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens to train on, rounded down to whole steps; in place of Trainer's max_steps."},
    )


def pretrain(pretraining: PretrainArguments, training_args: TrainingArguments) -> MHMoETrainer:
    """
    Train a model from random weights and save it with its tokenizer in `training_args.output_dir`, where
    `pretraining.json` has its costs and its validation perplexity after so many tokens, from the start on.

    The rows and their order come from the text, the tokenizer and the seed (`data_seed`, by default `seed`) alone: any
    two models see the same ones. A resumed run ends where an undisturbed one does.

    Raises:
        UserError: the model, the text, the tokenizer or the output folder cannot be used so.
    """
    check_pretraining(pretraining, training_args)
    config = build_config(pretraining)
    checkpoint = prepare_output(Path(training_args.output_dir), None, pretraining.overwrite, training_args)
    texts, validation_texts = load_texts(pretraining)
    tokenizer = load_tokenizer(pretraining, texts, checkpoint)
    fit_to_tokenizer(config, tokenizer, pretraining)
    block_size = pretraining.block_size or min(1024, config.max_position_embeddings)

    rows_per_step = (
        training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    )
    tokens_per_step = rows_per_step * block_size
    if pretraining.num_train_tokens is not None:
        training_args.max_steps = pretraining.num_train_tokens // tokens_per_step
    if training_args.max_steps < 1:
        raise UserError(
            f"num_train_tokens={pretraining.num_train_tokens} are less than one step of {tokens_per_step} "
            f"({rows_per_step} blocks of {block_size})"
        )
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    validation_rows = pretraining.max_eval_samples or (None if validation_texts else HELD_OUT_ROWS)
    with training_args.main_process_first(desc="packing the text"):  # the others find it in the cache of `datasets`
        train_rows, validation = pack_in_shares(
            list(texts.values()),
            list(validation_texts.values()),
            tokenizer,
            block_size,
            training_args.max_steps * rows_per_step,
            validation_rows,
            seed,
        )
    validation_rows = concatenate_datasets(validation)
    training_args.train_sampling_strategy = "sequential"  # the rows are in their order
    training_args.eval_on_start = checkpoint is None  # which has it in its log

    set_seed(training_args.seed)
    model = build_model(config, pretraining)
    report = Report(
        Path(training_args.output_dir) / REPORT,
        {
            "model": pretraining.preset or pretraining.config_name,
            "config_overrides": pretraining.config_overrides,
            "model_type": config.model_type,
            "seed": training_args.seed,
            "tokens_per_step": tokens_per_step,
            "validation_tokens": len(validation_rows) * (block_size - 1),
            **vars(costs(model.config)),
        },
    )
    use_cache = model.config.use_cache
    with refusals_in_one_line(training_args):
        trainer = MHMoETrainer(
            model=model,
            args=training_args,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=causal_batch,
            processing_class=tokenizer,
            compute_metrics=TokenQuality(),
            preprocess_logits_for_metrics=token_predictions,
            balance=pretraining.output_router_logits,
            callbacks=[report],
        )
        check_sharding(trainer, checkpoint)
    run_trainer(trainer, checkpoint, pretraining.overwrite)
    model.config.use_cache = use_cache  # Trainer turns it off, and would save it so
    if training_args.load_best_model_at_end or measured(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    if len(validation) > 1:
        report.figures["texts"] = {
            name: trainer.evaluate(rows, metric_key_prefix=f"text_{name}")[f"text_{name}_perplexity"]
            for name, rows in zip(validation_texts or texts, validation, strict=True)
        }
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_pretrained_card(Path(training_args.output_dir), report.figures)
    if training_args.push_to_hub:
        trainer.push_to_hub()  # saves first
    else:
        trainer.save_model()
    if trainer.is_world_process_zero():
        report.write(finished=True)
    return trainer


class Report(TrainerCallback):
    """
    Keeps `file` at what is known of a run: its costs, tokens a second of training (of the last session where it was
    resumed, without its first step) and the curve, `perplexity` on all validation text after `tokens`; at the end also
    the perplexity on each of several texts.
    """

    def __init__(self, file: Path, figures: dict):
        self.file = file
        self.figures = {**figures, "tokens_per_second": None, "curve": [], "texts": {}, "finished": False}
        self._steps, self._seconds, self._started = 0, 0.0, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        if self._steps > 1:  # the first one warms up
            self._seconds += self._now() - self._started

    def on_evaluate(self, args, state, control, **kwargs):
        tokens_per_step = self.figures["tokens_per_step"]
        self.figures["curve"] = [
            {"tokens": entry["step"] * tokens_per_step, "perplexity": entry["eval_perplexity"]}
            for entry in state.log_history
            if "eval_perplexity" in entry
        ]
        if self._seconds:
            self.figures["tokens_per_second"] = (self._steps - 1) * tokens_per_step / self._seconds
        if state.is_world_process_zero:
            self.write()

    def write(self, finished: bool = False) -> None:
        self.figures["finished"] = finished
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.file)

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


def check_pretraining(pretraining: PretrainArguments, training_args: TrainingArguments) -> None:
    """Raise a [`UserError`] for what could not work, or would silently do something else."""
    check_arguments(pretraining, training_args)
    for one, other in (("preset", "config_name"), ("tokenizer_name", "vocab_size")):
        if (getattr(pretraining, one) is None) == (getattr(pretraining, other) is None):
            given = "neither" if getattr(pretraining, one) is None else "both"
            raise UserError(f"{one}, {other}: {given} given; give one of them")
    if (pretraining.num_train_tokens is None) == (training_args.max_steps <= 0):
        given = "neither" if pretraining.num_train_tokens is None else "both"
        raise UserError(f"num_train_tokens, max_steps: {given} given; say with one of them how long to train")
    if pretraining.distributed_config is not None:
        raise UserError(
            "distributed_config: shares out a saved model as it is loaded, and this one is new; launch with "
            "accelerate's FSDP instead"
        )
    if pretraining.max_train_samples is not None:
        raise UserError(f"max_train_samples={pretraining.max_train_samples}: give num_train_tokens in its place")
    if pretraining.document_characters is not None and pretraining.document_characters < 1:
        raise UserError(f"document_characters={pretraining.document_characters} must be at least 1")
    if pretraining.vocab_size is not None and pretraining.vocab_size < 257:
        raise UserError(f"vocab_size={pretraining.vocab_size} must be at least 257: all bytes and the end of a text")
    if training_args.auto_find_batch_size:
        raise UserError("auto_find_batch_size=True: another batch size is another number of tokens; leave it out")
    if training_args.train_sampling_strategy != "random":
        raise UserError(
            f"train_sampling_strategy={training_args.train_sampling_strategy}: the order is fixed by the seed; "
            "leave it out"
        )


def build_config(pretraining: PretrainArguments) -> PreTrainedConfig:
    """The model's config, before its vocabulary is known; a [`UserError`] if there is no such model."""
    overrides = parse_overrides(pretraining.config_overrides)
    try:
        if pretraining.preset is not None:
            if pretraining.block_size is not None:
                overrides = {"max_position_embeddings": pretraining.block_size, **overrides}
            config = MHMoEConfig.from_preset(pretraining.preset, **overrides)
        else:
            config = AutoConfig.from_pretrained(pretraining.config_name)
            if unknown := [name for name in overrides if not hasattr(config, name)]:
                raise UserError(f"config_overrides: {config.model_type} has no field {unknown[0]}")
            config = type(config).from_dict({**config.to_dict(), **overrides})
            costs(config)
    except UserError:
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        origin = f"preset={pretraining.preset}" if pretraining.preset else f"config_name={pretraining.config_name}"
        raise UserError(f"{origin}: {one_line(error)}") from error
    except AttributeError as error:
        raise UserError(
            f"config_name={pretraining.config_name}: a {config.model_type} is not Llama-style, and its costs are not "
            "counted; choose another model"
        ) from error
    if pretraining.block_size is not None and pretraining.block_size > config.max_position_embeddings:
        raise UserError(
            f"block_size={pretraining.block_size} is more than max_position_embeddings="
            f"{config.max_position_embeddings}; choose a smaller one"
        )
    return config


def load_texts(pretraining: PretrainArguments) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Documents to train on and to validate on, by name; the latter may be none."""
    train, validation = _load_whole_texts(pretraining)
    if pretraining.document_characters is not None:
        train = {name: shuffled_pieces(text, pretraining.document_characters) for name, text in train.items()}
    return train, validation


def _load_whole_texts(pretraining: PretrainArguments) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    column = pretraining.text_column
    validation = _load_files(pretraining.validation_file or [], column)
    if pretraining.dataset_name is None:
        return _load_files(pretraining.train_file, column), validation
    origin = (pretraining.dataset_name, pretraining.dataset_config_name)
    train = load_hub_split(*origin, "train", column)
    if train is None:
        raise UserError(f"dataset_name={pretraining.dataset_name}: has no split `train`")
    if not validation and (split := load_hub_split(*origin, "validation", column)) is not None:
        validation = {"validation": split}
    return {"train": train}, validation


def _load_files(files: list[str], column: str) -> dict[str, Dataset]:
    names = [Path(file).name.split(".")[0] for file in files]
    if len(set(names)) < len(names):  # then only the whole path tells them apart
        names = files
    return {name: load_file(file, column) for name, file in zip(names, files, strict=True)}


def load_tokenizer(
    pretraining: PretrainArguments, texts: dict[str, Dataset], checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer by name, or one trained on `texts`; of a run that is resumed, the one it had."""
    if pretraining.tokenizer_name is None and checkpoint is None:
        return train_tokenizer(list(texts.values()), pretraining.vocab_size, pretraining.block_size or 1024)
    name = pretraining.tokenizer_name or checkpoint
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer_name={name}: cannot be loaded ({one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer_name={name}: has no eos_token, which separates documents; set one")
    return tokenizer


def fit_to_tokenizer(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, pretraining: PretrainArguments
) -> None:
    """Set what the config has to say of the tokenizer; a large enough `vocab_size` in the overrides stays."""
    wanted = parse_overrides(pretraining.config_overrides).get("vocab_size", len(tokenizer))
    if wanted < len(tokenizer):
        raise UserError(f"config_overrides: vocab_size={wanted} is less than the tokenizer's {len(tokenizer)} tokens")
    config.vocab_size = wanted
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def build_model(config: PreTrainedConfig, pretraining: PretrainArguments) -> PreTrainedModel:
    """The model with random weights."""
    options = {"dtype": pretraining.dtype} if pretraining.dtype != "auto" else {}
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(pretraining, name) is not None:
            options[name] = getattr(pretraining, name)
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(f"{config.model_type}: cannot be built ({one_line(error)})") from error
