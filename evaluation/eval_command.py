"""`mhmoe eval`: lm-eval's `run` command on one model, with statistics of the routing."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lm_eval._cli.run import Run

from mhmoe.errors import UserError
from mhmoe.options import OptionParser

from .checks import check_model
from .heatmap import save_heatmap
from .lm_eval_backends import Backend
from .tables import FIGURES, figures, table


if TYPE_CHECKING:  # --help should not wait for these
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
        "--backend",
        choices=get_args(Backend),
        default="hf",
        help="lm-eval's model: hf, or vllm where vLLM is installed, which shows no routing (default: %(default)s)",
    )
    parser.add_argument(
        "--update_card",
        action="store_true",
        help="add the metrics to the model-index of MODEL/README.md",
    )
    return parser


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    model, update_card, backend = options.pretrained, options.update_card, options.backend
    del options.pretrained, options.update_card, options.backend
    check_model(model)
    setup_logging()
    from mhmoe.sources import find_folder

    from .card import add_results, read_card
    from .eval_config import evaluator_config
    from .lm_eval_run import run

    config = evaluator_config(options, model)
    find_folder(model, config.model_args.get("revision"), weights=False)  # which is the gate
    if update_card:
        read_card(model)
    results, tracker = run(config, backend)
    if results is None:  # not the first process
        return
    if backend == "vllm":
        print("Routing: vLLM does not show which experts the tokens reach; --backend hf does.")
    if results.get("routing"):
        print(_routing_table(results["routing"]))
    if config.use_cache and "routing" in results:
        print(f"Routing: answers that were in the cache {config.use_cache} already are not counted.")
    if config.output_path:
        _save_heatmaps(results, tracker, Path(config.output_path), model)
    if update_card:
        add_results(model, results)


def setup_logging() -> None:
    """lm-eval's own, and its setting for tokenizers, which processes that load data would otherwise warn of."""
    from lm_eval.utils import setup_logging

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    setup_logging()


def _routing_table(routing: dict[str, dict]) -> str:
    rows = [[name, *figures(task), f"{task['num_sub_tokens']:,}"] for name, task in routing.items()]
    return table(["Routing", *FIGURES, "sub-tokens"], rows)


def _save_heatmaps(results: dict, tracker: "EvaluationTracker", path: Path, model: str) -> None:
    if path.suffix == ".json":
        folder, results_file = path.parent, f"{path.stem}_{tracker.date_id}.json"
    else:
        folder = path / str(tracker.general_config_tracker.model_name_sanitized)
        results_file = f"results_{tracker.date_id}.json"
    if not (folder / results_file).is_file():  # lm-eval only logs why
        raise UserError(f"--output_path {path}: lm-eval could not write the results there")
    from lm_eval.utils import sanitize_model_name

    for task, routing in results.get("routing", {}).items():
        file = folder / f"routing_{sanitize_model_name(task)}_{tracker.date_id}.png"
        save_heatmap(routing, f"{task}, {Path(model).name}", file)
    print(folder / results_file)
