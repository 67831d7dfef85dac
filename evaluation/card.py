"""lm-eval results as `model-index` entries of a model card, where the Hub reads them."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index

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
    file = Path(folder) / "README.md"
    card = read_card(folder)
    metadata = metadata_load(file) or {}
    names = [*results["configs"], *results.get("groups", ())]
    new = [entry for name in names for entry in _entries(name, results)]
    name = Path(folder).resolve().name
    added = eval_results_to_model_index(name, new)[0]["results"]
    # as it stands, since ModelCard gives all figures on one data set the name and the source of the first
    models: list[dict[str, Any]] = metadata.get("model-index") or [{"name": name, "results": []}]
    replaced = {identity for entry in added for identity in _identities(entry)}
    for model in models:
        model["results"] = [kept for entry in model["results"] if (kept := _without(replaced, entry))["metrics"]]
    models[-1]["results"] += added
    data = cast(ModelCardData, card.data)
    data.eval_results, data.model_name = None, metadata.get("model_name")
    data["model-index"] = models
    with replacing(file) as unfinished:
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


def _identities(entry: dict[str, Any]) -> list[tuple]:
    """What the metrics of an entry are of."""
    of_data = tuple(entry["dataset"].get(name) for name in ("type", "config", "split"))
    return [(*of_data, metric["type"], metric.get("name")) for metric in entry["metrics"]]


def _without(replaced: set[tuple], entry: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(_identities(entry), entry["metrics"], strict=True)
    return {**entry, "metrics": [metric for identity, metric in pairs if identity not in replaced]}
