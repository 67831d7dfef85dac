"""What `mhmoe eval` was asked for, from its flags and the file given with `--config`; every mistake is one line."""

import argparse
import logging
import os
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from lm_eval.config.evaluate_config import DICT_KEYS, EvaluatorConfig
from lm_eval.utils import simple_parse_args_string

from mhmoe.errors import UserError, one_line
from mhmoe.files import check_writable
from mhmoe.intake import check_file

from .checks import check_device


SAMPLES = '{"TASK": [ROW, ...], ...}'


def evaluator_config(options: argparse.Namespace, model: str) -> EvaluatorConfig:
    """
    lm-eval's settings for a run on `model`. Flags go before the fields of the file, as in lm-eval.

    Raises:
        UserError: there is a mistake that can be found before anything is loaded.
    """
    if options.model:
        raise UserError(f"--model {options.model}: leave it out; MODEL is a folder or an id on the Hub")
    defaults = _read(options.config) if options.config else {}
    model_args = defaults.get("model_args") or {}
    if isinstance(model_args, str):
        model_args = simple_parse_args_string(model_args)
    model_args = {"pretrained": model, **model_args, **(options.model_args or {})}
    if model_args["pretrained"] != model:
        raise UserError(f"--model_args pretrained={model_args['pretrained']}: leave it out; MODEL is {model}")
    options.model, options.model_args = "mhmoe", model_args
    tasks = options.tasks or defaults.get("tasks") or []
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    if unnamed := [task for task in tasks if not isinstance(task, str)]:
        raise UserError(f"--config {options.config}: tasks: {unnamed[0]!r} is no name of a task or of a YAML file")
    options.tasks = list(dict.fromkeys(task.strip() for task in tasks if task.strip()))
    if not options.tasks:
        raise UserError("--tasks: name at least one task, such as mhmoe_smoke; `lm-eval ls tasks` lists lm-eval's own")
    try:
        config = EvaluatorConfig.from_cli(options)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{one_line(error)}; see mhmoe eval --help") from error
    if device := options.device or defaults.get("device"):  # the default, cuda:0, falls back to the CPU
        check_device("--device", device)
    _check_places(config)
    _check_settings(config)
    return config


def _read(file: str) -> dict[str, Any]:
    """The fields of a `--config` file."""
    try:
        fields = EvaluatorConfig.load_yaml_config(file)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--config {file}: {one_line(error)}") from error
    hints = get_type_hints(EvaluatorConfig)
    for name, value in fields.items():
        if name not in hints:
            raise UserError(f"--config {file}: {name}={one_line(value)}: lm-eval has no such field")
        kinds = [get_origin(hint) or hint for hint in get_args(hints[name]) or (hints[name],)]
        # a string is read as on the command line; a batch size may be "auto"; 3 is a float too
        kinds += [str] * (name in DICT_KEYS or name == "batch_size") + [int] * (float in kinds)
        if not isinstance(value, tuple(kinds)):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in dict.fromkeys(kinds))
            raise UserError(f"--config {file}: {name}={one_line(value)}: give a value of type {names}")
    return fields


def _check_places(config: EvaluatorConfig) -> None:
    folder = config.include_path
    if folder and not (Path(folder).is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        raise UserError(f"--include_path {folder}: not a readable folder; give the one with the tasks' YAML files")
    for file in Path(folder).rglob("*.yaml") if folder else ():
        check_file(file, None)
    if config.use_cache:
        check_writable(f"--use_cache {config.use_cache}", Path(config.use_cache).parent)
    if config.output_path:
        path = Path(config.output_path)
        check_writable(f"--output_path {path}", path.parent if path.suffix == ".json" else path)


def _check_settings(config: EvaluatorConfig) -> None:
    if not re.fullmatch(r"[1-9]\d*|auto(:\d+(\.\d+)?)?", str(config.batch_size)):
        raise UserError(f"--batch_size {config.batch_size}: give a number of rows, auto or auto:N")
    if config.max_batch_size is not None and config.max_batch_size < 1:
        raise UserError(f"--max_batch_size {config.max_batch_size}: give at least 1")
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise UserError(f"--num_fewshot {config.num_fewshot}: give at least 0")
    if config.limit is not None and not config.limit > 0:
        raise UserError(f"--limit {config.limit}: give more than 0")
    max_length = config.model_args.get("max_length")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise UserError(f"--model_args max_length={max_length}: give a number of tokens, at least 1")
    levels = logging.getLevelNamesMapping()
    if config.verbosity and config.verbosity not in levels:
        raise UserError(f"--verbosity {config.verbosity}: give one of {', '.join(levels)}")
    if config.samples is not None and not _are_samples(config.samples):
        raise UserError(f"--samples {config.samples}: give JSON, or a file of JSON, of the form {SAMPLES}")


def _are_samples(samples: Any) -> bool:
    return isinstance(samples, dict) and all(
        isinstance(rows, list) and all(type(row) is int for row in rows) for rows in samples.values()
    )
