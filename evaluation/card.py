"""lm-eval results as `model-index` entries of a model card, where the Hub reads them."""

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from mhmoe.errors import UserError, one_line


SOURCE_URL = "https://github.com/EleutherAI/lm-evaluation-harness"


def read_card(folder: str | Path) -> ModelCard:
    """
    The card of a model folder.

    Raises:
        UserError: there is no README.md, or its metadata cannot be parsed.
    """
    file = Path(folder) / "README.md"
    if not file.is_file():
        raise UserError(f"{file}: no model card to update")
    try:
        return ModelCard.load(file)
    except Exception as error:  # of the YAML parser and of huggingface_hub's validation
        raise UserError(f"{file}: its metadata cannot be read ({one_line(error)}); mend it first") from error


def add_results(folder: str | Path, results: dict) -> None:
    """
    Write the metrics of every task into `folder/README.md`; an entry for the same task, metric and few-shot count is
    replaced, all else stays.

    Args:
        folder: a model folder with a README.md.
        results: what `evaluate_model` or `lm_eval.simple_evaluate` returned.
    """
    card = read_card(folder)
    new = [entry for task in results["configs"] for entry in _entries(task, results)]
    replaced = {_identity(entry) for entry in new}
    card.data.eval_results = [e for e in card.data.eval_results or [] if _identity(e) not in replaced] + new
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    unfinished = Path(folder) / ".README.md.tmp"
    card.save(unfinished)
    os.replace(unfinished, Path(folder) / "README.md")


def _entries(task: str, results: dict) -> list[EvalResult]:
    config = results["configs"][task]
    data_set = str(config.get("dataset_path") or "")
    on_hub = data_set.count("/") == 1 and not Path(data_set).exists()
    rows = results["n-samples"][task]
    part = f", {rows['effective']} of {rows['original']} rows" if rows["effective"] < rows["original"] else ""
    entries = []
    for key, value in results["results"][task].items():
        metric, separator, filter_name = key.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        filtered = "" if filter_name == "none" else f", {filter_name}"
        entries.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=data_set if on_hub else task,
                dataset_name=task,
                dataset_config=config.get("dataset_name") if on_hub else None,
                dataset_split=config.get("test_split") or config.get("validation_split"),
                metric_type=metric,
                # tasks can share a data set, whose entries then merge: only the metric's name keeps them apart
                metric_name=f"{task} {metric} ({results['n-shot'][task]}-shot{filtered}{part})",
                metric_value=float(value),
                source_name="lm-evaluation-harness",
                source_url=SOURCE_URL,
            )
        )
    return entries


def _identity(entry: EvalResult) -> tuple:
    return (entry.dataset_type, entry.dataset_config, entry.dataset_split, entry.metric_type, entry.metric_name)
