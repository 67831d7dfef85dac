"""lm-eval on a model, from Python, with statistics of the routing."""

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe.errors import UserError, one_line

from .averages import add_averages
from .lm_eval_backends import Backend, lm_class, stored_dtype
from .task_building import build_tasks, check_samples, task_mistakes


if TYPE_CHECKING:  # which take seconds to import
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from .routing import ExpertCounts


TASKS_FOLDER = Path(__file__).parent / "tasks"
# in YAML: what stands after a key that names something, and the lines of a list below it
NAMES = re.compile(
    rb"^[ \t]*(?:- *)*[\"']?(?:task|group|tag)[\"']?[ \t]*:(.*(?:\s*\n[ \t]*(?:- |#).*)*)", re.MULTILINE
)


def evaluate_model(
    model: "str | Path | PreTrainedModel",
    tasks: Sequence[str],
    *,
    backend: Backend = "hf",
    model_args: dict[str, Any] | None = None,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    device: str = "cuda:0",
    include_path: str | Path | Sequence[str | Path] | None = None,
    task_manager: "TaskManager | None" = None,
    **options,
) -> dict[str, Any] | None:
    """
    Run lm-eval tasks on a causal language model and count, for a MoE model, where its routers sent the sub-tokens.

    ```python
    >>> from mhmoe.evaluation import evaluate_model

    >>> results = evaluate_model("path/to/model", ["mhmoe_smoke"], batch_size=8)
    >>> results["results"]["mhmoe_smoke"]["acc,none"], results["routing"]["mhmoe_smoke"]["share_activated"]
    ```

    Args:
        model: folder, id on the Hub, or a model in memory (then `model_args` needs a `tokenizer`, unless the model
            was loaded from a place that has one).
        tasks: names of lm-eval tasks and groups. With this package come `mhmoe_smoke`, of 40 easy questions, and the
            groups of P1's tables 2 and 3 (arXiv 2404.15045), `mhmoe_english` and `mhmoe_xnli`, averaged as there.
        backend: lm-eval's model: `hf`, or `vllm` for a folder or an id, which counts no routing.
        model_args: further arguments of lm-eval's model, such as `{"dtype": "float32"}`.
        batch_size: rows at a time, or "auto" or "auto:N" as lm-eval has it.
        max_batch_size: where "auto" starts.
        device: "cpu", "cuda:1", ...; the default falls back to the CPU where there is no GPU, as in lm-eval's command.
        include_path: folder(s) of further task definitions.
        task_manager: in place of `include_path`.
        options: of `lm_eval.simple_evaluate`: limit, num_fewshot, log_samples, apply_chat_template, ...

    Returns:
        What `lm_eval.simple_evaluate` returns: None in all processes but the first. For MH-MoE and the other
        `routing.MODEL_TYPES` there is a further key `routing`: for each task and each group of tasks an
        [`ExpertCounts.summary`]; a task whose answers all came from lm-eval's cache has none.

    Raises:
        UserError: the model, a task or its rows cannot be loaded, a task is unknown, a chat template is missing.
    """
    import lm_eval.evaluator

    model_args = {"pretrained": str(model) if isinstance(model, Path) else model, **(model_args or {})}
    task_manager = task_manager or make_task_manager(tasks, include_path, metadata=_recordable(model_args))
    for task in tasks:
        if isinstance(task, str) and task not in task_manager.all_tasks and not Path(task).is_file():
            raise UserError(f"task {task!r} is not known; `lm-eval ls tasks` lists lm-eval's own")
    built = build_tasks(tasks, task_manager)
    check_samples(options.get("samples") or {}, built)
    settings = {"batch_size": batch_size, "max_batch_size": max_batch_size}
    lm = _load(backend, model_args, settings if backend == "vllm" else {**settings, "device": device})
    if lm.prefix_token_id is None:
        raise UserError(
            f"{_name(model)}: its tokenizer has neither bos_token nor eos_token, and lm-eval begins a text with one; "
            "set one"
        )
    if options.get("apply_chat_template"):
        _check_chat_template(lm, _name(model))
    # until there is a request, lm-eval only puts the tasks' questions together
    with task_mistakes(tasks, only_if=lambda: not getattr(lm, "was_asked", True)):
        results = lm_eval.evaluator.simple_evaluate(
            model=lm,
            model_args=_recordable(model_args),
            tasks=list(tasks) if options.get("check_integrity") else built,  # whose tests are found by name
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            device=device,
            task_manager=task_manager,
            **options,
        )
    counts = lm.gather_routing() if backend == "hf" else {}
    if results is None:
        return None
    results["config"]["model"] = "mhmoe" if backend == "hf" else backend
    add_averages(results, task_manager)
    if backend == "hf" and lm.moe_layers:
        results["routing"] = _by_task_and_group(counts, results)
    return results


def make_task_manager(
    tasks: Sequence[str],
    include_path: str | Path | Sequence[str | Path] | None = None,
    metadata: dict[str, Any] | None = None,
) -> "TaskManager":
    """
    lm-eval's index of tasks, with this package's own; lm-eval's 14 000 files are read only if `tasks` need them.

    Raises:
        UserError: a group is a part of itself.
    """
    from lm_eval.tasks.manager import TaskManager

    folders = [include_path] if isinstance(include_path, str | Path) else list(include_path or [])
    folders = [TASKS_FOLDER, *(folder for folder in folders if Path(folder) != TASKS_FOLDER)]
    included = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)

    def may_need_lm_evals(task: Any, within: frozenset[str] = frozenset()) -> bool:
        if task in within:
            raise UserError(f"group {task!r} is a part of itself")
        if task in included.all_groups:
            parts = (included.task_index[task].cfg or {}).get("task", [])
            return any(not isinstance(part, str) or may_need_lm_evals(part, within | {task}) for part in parts)
        if task in included.all_subtasks:
            return False
        found = [name for name in included.match_tasks([task]) if name != task]
        return any(may_need_lm_evals(name) for name in found) or _may_be_lm_evals(task)

    if any(may_need_lm_evals(str(task)) for task in tasks):
        return TaskManager(include_path=folders, metadata=metadata)
    return included


def _may_be_lm_evals(task: str) -> bool:
    """
    False where none of lm-eval's files gives a task, group or tag this name, or one that fits this pattern: to look
    for it takes a tenth of the time that lm-eval takes to understand them all. YAML files and folders are its own.
    """
    import lm_eval.tasks

    if task.endswith((".yaml", ".yml")) or os.path.isdir(task):
        return True
    matches = re.compile(os.fsencode(fnmatch.translate(task))).match
    for file in Path(lm_eval.tasks.__file__).parent.glob("*/**/*"):  # not .yaml alone: those include others
        if file.suffix not in (".py", ".pyc") and file.is_file():
            for names in NAMES.findall(file.read_bytes()):
                if any(matches(name) for name in re.split(rb"[\s\"'\[\],]+", names) if name):
                    return True
    return False


def _load(backend: Backend, model_args: dict[str, Any], settings: dict[str, Any]) -> Any:
    import torch

    if model_args.get("parallelize") and not torch.accelerator.is_available():
        raise UserError("parallelize: there is no accelerator to spread the model over; leave it out")
    model_class = lm_class(backend)
    try:
        if backend == "vllm":
            model_args = stored_dtype(model_args) | model_args
        return model_class.create_from_arg_obj(model_args, settings)
    except Exception as error:  # many libraries have a part in it, each with exceptions of its own
        raise UserError(f"{_name(model_args['pretrained'])}: cannot be loaded ({one_line(error)})") from error


def _check_chat_template(lm: Any, name: str) -> None:
    if not getattr(lm.tokenizer, "chat_template", None):
        raise UserError(f"apply_chat_template: the tokenizer of {name} has no chat template; leave it out")
    try:
        lm.apply_chat_template([{"role": "user", "content": "a question"}])
    except Exception as error:  # of Jinja, or whatever the template does
        raise UserError(
            f"apply_chat_template: the chat template of {name} fails ({one_line(error, 200)}); mend it or leave it out"
        ) from error


def _name(model: "str | Path | PreTrainedModel") -> str:
    return str(model) if isinstance(model, str | Path) else model.name_or_path or type(model).__name__


def _recordable(model_args: dict[str, Any]) -> dict[str, Any]:
    """`model_args` for a results file, with names in place of a model and a tokenizer in memory."""
    names = {key: value.name_or_path for key, value in model_args.items() if hasattr(value, "name_or_path")}
    return {**model_args, **names, "pretrained": _name(model_args["pretrained"])}


def _by_task_and_group(counts: "dict[str, ExpertCounts]", results: dict[str, Any]) -> dict[str, dict]:
    def tasks_of(name: str) -> list[str]:
        children = results["group_subtasks"].get(name)
        return [name] if not children else [task for child in children for task in tasks_of(child)]

    routing = {}
    for name in [*results["configs"], *results["group_subtasks"]]:
        counted = [counts[task] for task in dict.fromkeys(tasks_of(name)) if task in counts]
        if counted:
            routing[name] = sum(counted[1:], start=counted[0]).summary()
    return routing
