"""lm-eval results as `model-index` entries of a model card, where the Hub reads them."""

from pathlib import Path
from typing import cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mhmoe.errors import UserError, one_line
from mhmoe.files import replacing
from mhmoe.intake import check_file


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
    check_file(file, file.parent)
    try:
        return ModelCard.load(file)
    except Exception as error:  # of the YAML parser and of huggingface_hub's validation
        raise UserError(f"{file}: its metadata cannot be read ({one_line(error)}); mend it first") from error


def add_results(folder: str | Path, results: dict) -> None:
    """
    Write the metrics of every task, and the averages of every group, into `folder/README.md`; an entry for the same
    task, metric and few-shot count is replaced, all else stays.

    Args:
        folder: a model folder with a README.md.
        results: what `evaluate_model` or `lm_eval.simple_evaluate` returned.
    """
    card = read_card(folder)
    names = [*results["configs"], *results.get("groups", ())]
    new = [entry for name in names for entry in _entries(name, results)]
    replaced = {_identity(entry) for entry in new}
    data = cast(ModelCardData, card.data)
    data.eval_results = [e for e in data.eval_results or [] if _identity(e) not in replaced] + new
    data.model_name = data.model_name or Path(folder).resolve().name
    with replacing(Path(folder) / "README.md") as unfinished:
        card.save(unfinished)


def _entries(name: str, results: dict) -> list[EvalResult]:
    """The metrics of a task or group."""
    config = results["configs"].get(name, {})
    data_set = str(config.get("dataset_path") or "")
    on_hub = data_set.count("/") == 1 and not Path(data_set).exists()
    entries = []
    for key, value in results["results"][name].items():
        metric, separator, filter_name = key.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        filtered = "" if filter_name == "none" else f", {filter_name}"
        entries.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=data_set if on_hub else name,
                dataset_name=name,
                dataset_config=config.get("dataset_name") if on_hub else None,
                dataset_split=config.get("test_split") or config.get("validation_split"),
                metric_type=metric,
                # tasks can share a data set, whose entries then merge: only the metric's name keeps them apart
                metric_name=f"{name} {metric} ({_conditions(name, results, filtered)})",
                metric_value=float(value),
                source_name="lm-evaluation-harness",
                source_url=SOURCE_URL,
            )
        )
    return entries


def _conditions(name: str, results: dict, filtered: str) -> str:
    """How a figure came about: few-shot examples, filter, and the rows if not all were used."""
    tasks = _tasks(name, results)
    shots = sorted({results["n-shot"][task] for task in tasks})
    counts = [results["n-samples"][task] for task in tasks]
    effective, original = (sum(count[kind] for count in counts) for kind in ("effective", "original"))
    part = f", {effective} of {original} rows" if effective < original else ""
    return f"{' or '.join(map(str, shots))}-shot{filtered}{part}"


def _tasks(name: str, results: dict) -> list[str]:
    """Of a group and its groups; a task is its own."""
    if name in results["configs"]:
        return [name]
    return [task for member in results["group_subtasks"].get(name, ()) for task in _tasks(member, results)]


def _identity(entry: EvalResult) -> tuple:
    return (entry.dataset_type, entry.dataset_config, entry.dataset_split, entry.metric_type, entry.metric_name)
