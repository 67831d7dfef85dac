"""Pre-train a model from random weights on packed text: everything behind `mhmoe pretrain`."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from mhmoe.configuration import MHMoEConfig, costs, parse_overrides
from mhmoe.errors import UserError, one_line
from mhmoe.loading import load_config
from mhmoe.loading import load_tokenizer as read_tokenizer
from mhmoe.sources import find_folder

from .arguments import HELD_OUT_ROWS, PretrainArguments
from .card import write_pretrained_card
from .data import load_file, load_hub_split, stream_files
from .evaluation_budget import describe_budget, evaluation_rows
from .report import REPORT, Report
from .rows import pack_in_shares, pack_validation, shuffled_pieces, train_tokenizer
from .run import prepare_output, push, run_trainer, surviving
from .streaming import TextStream, stream_of
from .train import check_arguments
from .trainer import MHMoETrainer


MOST_ROWS = 10**9  # whose order is held in memory

logger = logging.getLogger(__name__)


def pretrain(pretraining: PretrainArguments, training_args: TrainingArguments) -> MHMoETrainer:
    """
    Train a model from random weights and save it with its tokenizer in `training_args.output_dir`, where
    `pretraining.json` has its costs and its validation perplexity after so many tokens, from the start on.

    The rows and their order come from the text, the tokenizer and the seed (`data_seed`, by default `seed`) alone: any
    two models see the same ones. A resumed run ends where an undisturbed one does.

    Raises:
        UserError: the model, the text, the tokenizer or the output folder cannot be used so, or what was saved could
            not be pushed.
    """
    check_pretraining(pretraining, training_args)
    config = build_config(pretraining)
    output = Path(training_args.output_dir)  # ty: ignore[invalid-argument-type]: never None
    checkpoint = prepare_output(output, None, pretraining.overwrite, training_args)
    texts, validation_texts = load_texts(pretraining)
    tokenizer = load_tokenizer(pretraining, texts, checkpoint)
    fit_to_tokenizer(config, tokenizer, pretraining)
    block_size = pretraining.block_size or min(1024, config.max_position_embeddings)
    tokens_per_step = set_steps(pretraining, training_args, block_size)
    rows = load_rows(pretraining, training_args, texts, validation_texts, tokenizer, block_size)

    set_seed(training_args.seed)
    model = build_model(config, pretraining)
    report = Report(
        output / REPORT,
        {
            "model": model_name(pretraining),
            "config_overrides": pretraining.config_overrides,
            "model_type": config.model_type,
            "seed": training_args.seed,
            "tokens_per_step": tokens_per_step,
            "validation_tokens": len(rows.validation) * (block_size - 1),
            **vars(costs(model.config)),
        },
    )
    training_args.train_sampling_strategy = "sequential"  # the rows are in their order
    training_args.eval_on_start = checkpoint is None  # which has it in its log
    trainer = run_trainer(
        model, tokenizer, rows.train, rows.validation, pretraining, training_args, checkpoint, [report]
    )
    if len(rows.by_text) > 1:
        report.figures["texts"] = {
            # ty: ignore[invalid-argument-type]: Trainer takes rows of `datasets` too
            name: trainer.evaluate(text_rows, metric_key_prefix=f"text_{name}")[f"text_{name}_perplexity"]
            for name, text_rows in rows.by_text.items()
        }
    if trainer.is_world_process_zero():
        with surviving(f"{output / 'README.md'}: was not written"):
            write_pretrained_card(output, report.figures)
        report.write(finished=True)
    push(trainer)
    return trainer


def model_name(pretraining: PretrainArguments) -> str:
    """What the model is called in what a run leaves: a preset, an id on the Hub, or a folder's name, not its path."""
    if pretraining.preset is not None:
        return pretraining.preset
    assert pretraining.config_name is not None  # one of the two is given
    folder = Path(pretraining.config_name)
    return folder.resolve().name if folder.exists() else pretraining.config_name


def set_steps(pretraining: PretrainArguments, training_args: TrainingArguments, block_size: int) -> int:
    """Set `max_steps` where tokens were given in its place; returns the tokens of a step."""
    rows_per_step = _rows_per_step(training_args)
    tokens_per_step = rows_per_step * block_size
    if pretraining.num_train_tokens is not None:
        training_args.max_steps = pretraining.num_train_tokens // tokens_per_step
    if training_args.max_steps < 1:
        raise UserError(
            f"num_train_tokens={pretraining.num_train_tokens} are less than one step of {tokens_per_step} "
            f"({rows_per_step} blocks of {block_size})"
        )
    if training_args.max_steps * rows_per_step > MOST_ROWS:
        raise UserError(
            f"max_steps={training_args.max_steps}: with {rows_per_step} blocks each these are more than {MOST_ROWS:,} "
            "blocks, and than any run has; give fewer"
        )
    return tokens_per_step


def _rows_per_step(training_args: TrainingArguments) -> int:
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


@dataclass(frozen=True)
class Rows:
    """Packed rows: to train on in their order, to validate on, and the latter text by text."""

    train: Dataset | TextStream
    validation: Dataset
    by_text: dict[str, Dataset]


def load_rows(
    pretraining: PretrainArguments,
    training_args: TrainingArguments,
    texts: dict[str, Any],
    validation_texts: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> Rows:
    """Pack as many rows as the run needs."""
    number = training_args.max_steps * _rows_per_step(training_args)
    validation_rows = evaluation_rows(pretraining, training_args, number, block_size, len(validation_texts))
    with training_args.main_process_first(desc="packing the text"):  # the others find it in the cache of `datasets`
        given = (list(texts.values()), list(validation_texts.values()), tokenizer, block_size)
        if pretraining.streaming:
            validation, held_out = pack_validation(*given, validation_rows)
            train = stream_of(given[0], pretraining, training_args, tokenizer, block_size, held_out)
        else:
            seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
            train, validation = pack_in_shares(*given, number, validation_rows, seed)
    by_text = dict(zip(validation_texts or texts, validation, strict=True))
    rows = Rows(train, concatenate_datasets(validation), by_text)
    full = HELD_OUT_ROWS if not validation_texts else math.inf
    limited = any(len(text_rows) == -(-validation_rows // len(by_text)) for text_rows in validation)
    if (
        pretraining.max_eval_samples is None
        and validation_rows < full
        and limited
        and training_args.process_index == 0
    ):
        logger.warning("%s", describe_budget(training_args, len(rows.validation), block_size))
    return rows


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
            assert pretraining.config_name is not None  # one of the two is given
            config = load_config(
                _folder("config_name", pretraining.config_name), f"config_name={pretraining.config_name}"
            )
            if unknown := [name for name in overrides if not hasattr(config, name)]:
                raise UserError(f"config_overrides: {config.model_type} has no field {unknown[0]}")
            config = type(config).from_dict({**config.to_dict(), **overrides})
            config.return_dict = True  # transformers' own models fail to give tuples where their config asks for them
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


def load_texts(pretraining: PretrainArguments) -> tuple[dict[str, Any], dict[str, Dataset]]:
    """Documents to train on (which may be streamed) and to validate on, by name; the latter may be none."""
    train, validation = _load_whole_texts(pretraining)
    if pretraining.document_characters is not None:
        train = {name: shuffled_pieces(text, pretraining.document_characters) for name, text in train.items()}
    return train, validation


def _load_whole_texts(pretraining: PretrainArguments) -> tuple[dict[str, Any], dict[str, Dataset]]:
    column, streaming = pretraining.text_column, pretraining.streaming
    validation = _load_files(pretraining.validation_file or [], column)
    if pretraining.dataset_name is None:
        return _load_files(pretraining.train_file or [], column, streaming), validation
    origin = (pretraining.dataset_name, pretraining.dataset_config_name)
    train = load_hub_split(*origin, "train", column, streaming)
    if train is None:
        raise UserError(f"dataset_name={pretraining.dataset_name}: has no split `train`")
    if not validation and (split := load_hub_split(*origin, "validation", column)) is not None:
        validation = {"validation": split}
    return {"train": train}, validation


def _load_files(files: list[str], column: str, streaming: bool = False) -> dict[str, Any]:
    names = [Path(file).name.split(".")[0] for file in files]
    if len(set(names)) < len(names):  # then as much of the paths as tells them apart, since reports are published
        paths = [Path(file).resolve() for file in files]
        if repeated := {file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1}:
            raise UserError(f"{min(repeated)}: is given twice; name each text once")
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).as_posix() for path in paths]
    loaded = (stream_files([file], column) if streaming else load_file(file, column) for file in files)
    return dict(zip(names, loaded, strict=True))


def _folder(field: str, name: str) -> Path:
    """Where what a field names lies, downloaded first if it is on the Hub."""
    try:
        return find_folder(name, weights=False)[0]
    except UserError as error:
        raise UserError(f"{field}={error}") from error


def load_tokenizer(
    pretraining: PretrainArguments, texts: dict[str, Any], checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer by name, or one trained on `texts`; of a run that is resumed, the one it had."""
    name = checkpoint if pretraining.tokenizer_name is None else pretraining.tokenizer_name
    if name is None:
        assert pretraining.vocab_size is not None  # one of the two is given
        return train_tokenizer(list(texts.values()), pretraining.vocab_size, pretraining.block_size or 1024)
    tokenizer = read_tokenizer(_folder("tokenizer_name", name), f"tokenizer_name={name}")
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
    options = pretraining.loading()
    if options["dtype"] == "auto":  # the config's
        del options["dtype"]
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(f"{config.model_type}: cannot be built ({one_line(error)})") from error
