"""The groups of tasks that stand for the tables of arXiv 2404.15045, P1, and their averages."""

import json
from pathlib import Path

import lm_eval.tasks
import lm_eval.tasks.manager
import pytest
import yaml
from huggingface_hub import ModelCard
from lm_eval.tasks import TaskManager
from tiny import tiny_model, tiny_tokenizer

from mhmoe.evaluation import TASKS_FOLDER, evaluate_model
from mhmoe.evaluation.averages import add_averages
from mhmoe.evaluation.card import add_results
from mhmoe.evaluation.evaluate import make_task_manager


ENGLISH = {
    "arc_challenge": ["acc", "acc_norm"],
    "arc_easy": ["acc", "acc_norm"],
    "rte": ["acc"],
    "openbookqa": ["acc", "acc_norm"],
    "winogrande": ["acc"],
    "piqa": ["acc"],
    "boolq": ["acc"],
    "hellaswag": ["acc", "acc_norm"],
    "truthfulqa_mc1": ["acc"],
    "truthfulqa_mc2": ["acc"],
}
LANGUAGES = ["bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]
GROUPS = {"mhmoe_english": ENGLISH, "mhmoe_xnli": {f"xnli_{language}": ["acc"] for language in LANGUAGES}}


@pytest.fixture(scope="module")
def lm_eval_tasks() -> dict[str, dict]:
    """lm-eval's own definitions, of the folders that matter: to read all takes seconds."""
    root = Path(lm_eval.tasks.__file__).parent
    names = ("arc", "glue", "openbookqa", "winogrande", "piqa", "super_glue", "hellaswag", "truthfulqa", "xnli")
    manager = TaskManager(include_path=[root / name for name in names], include_defaults=False)
    return {task: manager.task_index[task].cfg for task in manager.all_subtasks}


@pytest.fixture
def no_defaults(monkeypatch):
    """Fails where lm-eval's thousands of tasks would be indexed."""
    own = lm_eval.tasks.manager.TaskManager

    def manager(include_path=None, include_defaults=True, metadata=None):
        assert not include_defaults
        return own(include_path=include_path, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_eval.tasks.manager, "TaskManager", manager)


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory) -> Path:
    """
    Tasks of those names with made-up rows. All rows of all tasks ask for the same, so a model gives one answer to all
    of them, first or second; the n-th task has n rows with the first as gold and one with the second.
    """
    folder = tmp_path_factory.mktemp("tasks")
    for tasks in GROUPS.values():
        for number, (name, metrics) in enumerate(tasks.items()):
            rows = folder / f"{name}.jsonl"
            rows.write_text("".join(json.dumps({"gold": int(row == number)}) + "\n" for row in range(number + 1)))
            definition = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "Which?",
                "doc_to_choice": ["this", "that"],
                "doc_to_target": "gold",
                "metric_list": [{"metric": metric} for metric in metrics],
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    return folder


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_of_tasks_that_lm_eval_has(group, lm_eval_tasks):
    definition = yaml.safe_load((TASKS_FOLDER / f"{group}.yaml").read_text())
    assert definition["group"] == group
    assert definition["task"] == list(GROUPS[group])
    for task, metrics in GROUPS[group].items():
        assert set(metrics) <= {entry["metric"] for entry in lm_eval_tasks[task]["metric_list"]}
    if group == "mhmoe_xnli":
        assert {f"xnli_{language}" for language in [*LANGUAGES, "ar"]} == {
            task for task in lm_eval_tasks if task.startswith("xnli_")
        }


def run(local_tasks: Path, **options) -> dict:
    return evaluate_model(
        tiny_model(),
        list(GROUPS),
        model_args={"tokenizer": tiny_tokenizer()},
        include_path=local_tasks,
        batch_size=16,
        bootstrap_iters=0,
        device="cpu",
        **options,
    )


@pytest.mark.usefixtures("no_defaults")
def test_averages_go_to_the_card(local_tasks, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    results = run(local_tasks, limit=2)
    add_results(tmp_path, results)
    entries = ModelCard.load(tmp_path / "README.md").data.eval_results
    averages = {entry.metric_name: entry.metric_value for entry in entries if entry.dataset_name in GROUPS}
    # a task has as many rows as its place in the list
    english, xnli = (sum(range(1, len(tasks) + 1)) for tasks in GROUPS.values())
    assert averages == {
        f"mhmoe_english average (0-shot, 19 of {english} rows)": results["results"]["mhmoe_english"]["average,none"],
        f"mhmoe_xnli acc (0-shot, 27 of {xnli} rows)": results["results"]["mhmoe_xnli"]["acc,none"],
    }
    assert len(entries) == len(averages) + 14 + 14
    add_results(tmp_path, results)
    assert len(ModelCard.load(tmp_path / "README.md").data.eval_results) == len(entries)


@pytest.mark.usefixtures("no_defaults")
def test_averages_of_whole_groups(local_tasks):
    results = run(local_tasks)
    answers_first = results["results"]["xnli_zh"]["acc,none"] > 0.5
    shares = {
        task: number / (number + 1) if answers_first else 1 / (number + 1)
        for tasks in GROUPS.values()
        for number, task in enumerate(tasks)
    }
    assert {task: results["results"][task]["acc,none"] for task in shares} == pytest.approx(shares)

    english = [shares[task] for task, metrics in ENGLISH.items() for _ in metrics]
    assert len(english) == 14
    assert results["results"]["mhmoe_english"]["average,none"] == pytest.approx(sum(english) / 14)
    xnli = [shares[task] for task in GROUPS["mhmoe_xnli"]]
    assert results["results"]["mhmoe_xnli"]["acc,none"] == pytest.approx(sum(xnli) / 14)
    assert "average,none" not in results["results"]["mhmoe_xnli"]
    # as lm-eval's tables show them
    assert {group: row.keys() & {"acc,none", "average,none"} for group, row in results["groups"].items()} == {
        "mhmoe_english": {"average,none"},
        "mhmoe_xnli": {"acc,none"},
    }
    assert results["routing"]["mhmoe_english"]["num_tokens"] == sum(
        results["routing"][task]["num_tokens"] for task in ENGLISH
    )


# the fourteen figures of a row of P1's table 2, from ARC-Challenge to TruthfulQA, and its average
TABLE_2 = {
    "dense": ([18.1, 23.3, 44.9, 39.7, 51.5, 17.1, 29.0, 48.2, 66.6, 55.0, 29.7, 34.1, 24.1, 39.3], 37.2),
    "X-MoE, 8": ([19.0, 24.7, 48.3, 42.0, 52.7, 17.4, 29.8, 50.3, 67.9, 58.4, 31.4, 35.7, 24.3, 40.2], 38.7),
    "MH-MoE, 8": ([19.6, 25.2, 50.2, 42.2, 53.0, 18.2, 30.3, 51.1, 68.7, 59.6, 33.2, 40.3, 24.7, 40.9], 39.8),
    "X-MoE, 32": ([19.4, 24.8, 50.4, 42.5, 52.7, 17.8, 30.0, 51.3, 68.8, 52.8, 33.4, 40.1, 24.3, 39.1], 39.1),
    "MH-MoE, 32": ([21.4, 26.8, 50.6, 44.8, 53.4, 18.8, 31.6, 53.8, 69.3, 56.6, 35.0, 42.1, 24.8, 39.5], 40.6),
}


def table_row(figures: list[float]) -> dict:
    remaining = iter(figures)
    tasks = {
        task: {f"{metric},none": next(remaining) for metric in metrics} | {"sample_len": 100 * number}
        for number, (task, metrics) in enumerate(ENGLISH.items(), start=1)
    }
    tasks["piqa"]["acc_norm,none"] = 99.0  # which the paper does not print
    return {
        "results": {**tasks, "mhmoe_english": {"alias": "mhmoe_english"}},
        "group_subtasks": {"mhmoe_english": list(ENGLISH)},
        "higher_is_better": {},
    }


@pytest.mark.parametrize("row", TABLE_2)
def test_average_of_table_2_is_the_papers(row):
    figures, average = TABLE_2[row]
    results = table_row(figures)
    add_averages(results, make_task_manager(["mhmoe_smoke"]))
    assert round(results["results"]["mhmoe_english"]["average,none"], 1) == average
    assert results["groups"]["mhmoe_english"]["alias"] == "mhmoe_english"
    assert results["higher_is_better"]["mhmoe_english"] == {"average": True}


def test_no_average_where_a_figure_is_missing():
    results = table_row(TABLE_2["dense"][0])
    del results["results"]["hellaswag"]["acc_norm,none"]
    add_averages(results, make_task_manager(["mhmoe_smoke"]))
    assert results["results"]["mhmoe_english"] == {"alias": "mhmoe_english"}
    assert "groups" not in results


@pytest.mark.usefixtures("no_defaults")
def test_lm_evals_own_tasks_are_read_where_a_group_needs_them(local_tasks):
    assert "rte" in make_task_manager(["mhmoe_english"], local_tasks).all_subtasks
    with pytest.raises(AssertionError):
        make_task_manager(["mhmoe_english"])
    assert "rte" in make_task_manager(["mhmoe_smoke", "mhmoe_*"], local_tasks).all_subtasks
    with pytest.raises(AssertionError):
        make_task_manager(["mhmoe_smoke", "mhmoe_*"])


@pytest.mark.usefixtures("no_defaults")
def test_a_name_that_is_in_none_of_their_files_costs_no_reading():
    for unknown in ("no_such_task_17", "3", "x=1", "doc_to_text", "[1]", "no_such_*", "/dev/zero"):
        assert unknown not in make_task_manager([unknown, "mhmoe_smoke"]).all_tasks
    # a task, a group, tags in one line and below each other, in what a task's file includes, patterns
    for known in ("hellaswag", "mmlu", "ai2_arc", "self_consistency", "acp_bench", "hellaswa[gh]", "mmlu_*", "*"):
        with pytest.raises(AssertionError):
            make_task_manager([known])
