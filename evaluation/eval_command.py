"""`mhmoe eval`: lm-eval's `run` command on one model, with statistics of the routing."""

import argparse
import os
import re
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from lm_eval._cli.run import Run

from mhmoe.errors import UserError, one_line
from mhmoe.options import OptionParser

from .checks import check_model, check_output
from .heatmap import save_heatmap
from .tables import FIGURES, figures, table


if TYPE_CHECKING:  # --help should not wait for these
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker


EPILOG = """\
examples:
  mhmoe eval path/to/model --tasks mhmoe_smoke --batch_size 8
  mhmoe eval org/model --tasks arc_easy piqa --batch_size auto --output_path results --log_samples
  mhmoe eval path/to/model --tasks mhmoe_english mhmoe_xnli   (tables 2 and 3 of arXiv 2404.15045)

With --output_path, lm-eval's results file gets a `routing` entry (load per expert, share of experts activated,
different experts per token, entropy; for each task and layer), and a heatmap of each task lies beside it.
"""


def parser() -> argparse.ArgumentParser:
    subparsers = argparse.ArgumentParser(add_help=False).add_subparsers(parser_class=OptionParser)
    Run.create(subparsers)
    parser = subparsers.choices["run"]
    parser.prog = "mhmoe eval"
    parser.usage = "mhmoe eval MODEL --tasks <task> <task> [options]"
    parser.description = "Run lm-eval tasks on a model, and show which experts of an MH-MoE model the tokens reach."
    parser.epilog = EPILOG
    next(action for action in parser._actions if action.dest == "model").help = argparse.SUPPRESS
    parser.add_argument("pretrained", metavar="MODEL", help="folder with a model, or its id on the Hub")
    parser.add_argument(
        "--update_card",
        action="store_true",
        help="add the metrics to the model-index of MODEL/README.md",
    )
    return parser


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    model, update_card = options.pretrained, options.update_card
    del options.pretrained, options.update_card
    check_model(model)
    setup_logging()
    from .card import add_results, read_card
    from .lm_eval_run import run

    config = _config(options, model)
    if update_card:
        read_card(model)
    results, tracker = run(config)
    if results is None:  # not the first process
        return
    if results.get("routing"):
        print(_routing_table(results["routing"]))
    if options.use_cache and "routing" in results:
        print(f"Routing: answers that were in the cache {options.use_cache} already are not counted.")
    if options.output_path:
        _save_heatmaps(results, tracker, model)
    if update_card:
        add_results(model, results)


def setup_logging() -> None:
    """lm-eval's own, and its setting for tokenizers, which processes that load data would otherwise warn of."""
    from lm_eval.utils import setup_logging

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    setup_logging()


def _config(options: argparse.Namespace, model: str) -> "EvaluatorConfig":
    """Flags before the fields of `--config`, as in lm-eval; finds the user's mistakes before anything is loaded."""
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import simple_parse_args_string

    from .evaluate import TASKS_FOLDER

    if options.model:
        raise UserError(f"--model {options.model}: leave it out; MODEL is a folder or an id on the Hub")
    defaults = _defaults(options.config) if options.config else {}
    options.model = "mhmoe"
    model_args = defaults.get("model_args") or {}
    if isinstance(model_args, str):
        model_args = simple_parse_args_string(model_args)
    model_args = {"pretrained": model, **model_args, **(options.model_args or {})}
    if model_args["pretrained"] != model:
        raise UserError(f"--model_args pretrained={model_args['pretrained']}: leave it out; MODEL is {model}")
    options.model_args = model_args

    tasks = options.tasks or defaults.get("tasks") or []
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    options.tasks = list(dict.fromkeys(task.strip() for task in tasks if task.strip()))
    if not options.tasks:
        raise UserError("--tasks: name at least one task, such as mhmoe_smoke; `lm-eval ls tasks` lists lm-eval's own")

    include_path = options.include_path or defaults.get("include_path")
    if include_path and not (Path(include_path).is_dir() and os.access(include_path, os.R_OK | os.X_OK)):
        raise UserError(
            f"--include_path {include_path}: not a readable folder; give the one with the tasks' YAML files"
        )
    options.include_path = [str(TASKS_FOLDER), *([include_path] if include_path else [])]

    batch_size = str(getattr(options, "batch_size", defaults.get("batch_size", 1)))
    if not re.fullmatch(r"[1-9]\d*|auto(:\d+(\.\d+)?)?", batch_size):
        raise UserError(f"--batch_size {batch_size}: give a number of rows, auto or auto:N")
    for name, least in (("limit", 0), ("num_fewshot", 0), ("max_batch_size", 1)):
        value = defaults.get(name) if getattr(options, name) is None else getattr(options, name)
        if value is not None and not (value >= least and (value > 0 or name != "limit")):
            raise UserError(f"--{name} {value}: give {'more than 0' if name == 'limit' else f'at least {least}'}")

    options.output_path = options.output_path or defaults.get("output_path")
    if options.output_path:
        path = Path(options.output_path)
        check_output("--output_path", path, path.parent if path.suffix == ".json" else path)
        if path.is_dir() and path.suffix == ".json":
            raise UserError(f"--output_path {path}: a folder; give another name, or one that does not end in .json")
    try:
        return EvaluatorConfig.from_cli(options)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{one_line(error)}; see mhmoe eval --help") from error


def _defaults(file: str) -> dict[str, Any]:
    """The fields of a `--config` file."""
    from lm_eval.config.evaluate_config import DICT_KEYS, EvaluatorConfig

    try:
        fields = EvaluatorConfig.load_yaml_config(file)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--config {file}: {one_line(error)}") from error
    hints = get_type_hints(EvaluatorConfig)
    for name, value in fields.items():
        if name not in hints:
            raise UserError(f"--config {file}: {name}={value!r}: lm-eval has no such field")
        kinds = [get_origin(hint) or hint for hint in get_args(hints[name]) or (hints[name],)]
        # read from a string as on the command line, or a number that is a size as well as "auto"
        kinds += [str] * (name in DICT_KEYS or name == "batch_size") + [int] * (float in kinds)
        if not isinstance(value, tuple(kinds)):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in dict.fromkeys(kinds))
            raise UserError(f"--config {file}: {name}={value!r}: give a value of type {names}")
    return fields


def _routing_table(routing: dict[str, dict]) -> str:
    rows = [[name, *figures(task), f"{task['num_sub_tokens']:,}"] for name, task in routing.items()]
    return table(["Routing", *FIGURES, "sub-tokens"], rows)


def _save_heatmaps(results: dict, tracker: "EvaluationTracker", model: str) -> None:
    path = Path(tracker.output_path)
    if path.suffix == ".json":
        folder, results_file = path.parent, f"{path.stem}_{tracker.date_id}.json"
    else:
        folder = path / tracker.general_config_tracker.model_name_sanitized
        results_file = f"results_{tracker.date_id}.json"
    if not (folder / results_file).is_file():  # lm-eval only logs why
        raise UserError(f"--output_path {path}: lm-eval could not write the results there")
    from lm_eval.utils import sanitize_model_name

    for task, routing in results.get("routing", {}).items():
        file = folder / f"routing_{sanitize_model_name(task)}_{tracker.date_id}.png"
        save_heatmap(routing, f"{task}, {Path(model).name}", file)
    print(folder / results_file)
