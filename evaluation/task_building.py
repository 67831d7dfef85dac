"""lm-eval's tasks, built before a model is loaded; a mistake in a definition becomes one line."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mhmoe.errors import UserError, one_line


if TYPE_CHECKING:  # which take seconds to import
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


def build_tasks(tasks: Sequence[Any], task_manager: "TaskManager") -> "list[Task | Group]":
    """
    What `simple_evaluate` would build of `tasks`: names, paths of YAML files, definitions, or tasks themselves.

    Raises:
        UserError: a definition has a mistake, or its rows cannot be read.
    """
    built = []
    with task_mistakes(tasks):
        for task in tasks:
            loaded = task_manager.load([task])
            groups = list(loaded.get("groups", {}).values())
            # the first group holds the others; a tag is its tasks
            built += groups[:1] or loaded["tasks"].values()
            for name, one in loaded["tasks"].items():
                if unknown := [metric for metric, function in one.aggregation().items() if not callable(function)]:
                    raise UserError(f"task {name}: lm-eval does not know the aggregation of its metric {unknown[0]}")
    return built


def check_samples(samples: dict[str, Any], built: "Sequence[Task | Group]") -> None:
    """UserError if rows are chosen of a task that is not among those `built`."""
    from lm_eval.api.group import Group

    tasks = [task for one in built for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]
    names = [task.task_name for task in tasks]
    if unknown := [name for name in samples if name not in names]:
        raise UserError(f"samples: {unknown[0]!r} is none of the tasks {', '.join(names)}")


@contextmanager
def task_mistakes(tasks: Sequence[Any], only_if: Callable[[], bool] = lambda: True) -> Generator[None]:
    """
    Turn what lm-eval raises for a mistake in a task's definition into a [`UserError`].

    Args:
        only_if: false once exceptions may be of something else.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UserError:
        raise
    except (ConnectionError, FileNotFoundError, DatasetsError) as error:
        raise UserError(
            f"the rows of a task cannot be read ({one_line(error)}); get the data set, or let the task read local rows"
        ) from error
    except ImportError as error:
        raise UserError(f"a task cannot be loaded ({one_line(error)}); install the packages that it needs") from error
    except Exception as error:  # on which exceptions there are, a YAML file has every influence
        if not only_if():
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        names = ", ".join(task if isinstance(task, str) else type(task).__name__ for task in tasks)
        raise UserError(f"tasks {names}: cannot be set up ({reason}); see their YAML, and flags about it") from error
