"""Averages over the tasks of a group that lm-eval cannot form itself: of different metrics of different tasks."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # lm-eval takes seconds to import
    from lm_eval.tasks import TaskManager


def add_averages(results: dict[str, Any], task_manager: "TaskManager") -> None:
    """
    Give each group whose YAML has `metadata: {average: {TASK: [METRIC, ...]}}` the metric `average`: the mean of all
    those figures, none weighted by the size of its task. The average of P1's table 2 (arXiv 2404.15045) is formed so,
    by the group `mhmoe_english`. A group that lacks one of the figures gets no average.

    Args:
        results: of `lm_eval.simple_evaluate`; the averages are added to its `results` and `groups`, from which
            lm-eval makes its tables.
        task_manager: which knows the groups.
    """
    for group in results["group_subtasks"]:
        entry = task_manager.task_index.get(group)
        averaged = ((entry.cfg or {}).get("metadata") or {}).get("average") if entry else None
        if not averaged:
            continue
        figures = [
            results["results"].get(task, {}).get(f"{metric},none")
            for task, metrics in averaged.items()
            for metric in metrics
        ]
        if None in figures:  # of a task that was not run
            continue
        row = results["results"].setdefault(group, {"alias": group})
        row["average,none"] = sum(figures) / len(figures)
        results.setdefault("groups", {})[group] = row
        results["higher_is_better"].setdefault(group, {})["average"] = True
