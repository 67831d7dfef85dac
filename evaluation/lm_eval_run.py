"""What lm-eval's `run` command does around an evaluation, with the evaluation of this package inside."""

import glob
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.utils import handle_non_serializable, make_table

from mhmoe.errors import UserError, one_line
from mhmoe.intake import check_file

from .evaluate import evaluate_model, make_task_manager
from .lm_eval_backends import Backend


logger = logging.getLogger(__name__)


def run(config: EvaluatorConfig, backend: Backend = "hf") -> tuple[dict[str, Any] | None, EvaluationTracker]:
    """
    Evaluate `config.model_args["pretrained"]` with a backend of [`evaluate_model`], then log, save and print as
    `lm-eval run` would.

    Returns:
        The results, None in all processes but the first; and what saved them, which knows where.

    Raises:
        UserError: of [`evaluate_model`], and for a task, a tracker or an account that cannot be used.
    """
    services = _services(config)
    where: dict[str, Any] = config.hf_hub_log_args | (
        {"output_path": config.output_path} if config.output_path else {}
    )
    try:
        tracker = EvaluationTracker(**where)
    except (TypeError, ValueError) as error:
        raise UserError(f"--hf_hub_log_args: {one_line(error)}") from error
    manager = make_task_manager(config.tasks, config.include_path, metadata=config.metadata)
    # `from_cli` has made four of what was given
    seeds = config.seed if isinstance(config.seed, list) else [None] * 4
    seed_names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    passed_on = (
        *("num_fewshot", "batch_size", "max_batch_size", "device", "use_cache", "limit", "samples"),
        *("check_integrity", "write_out", "log_samples", "system_instruction", "apply_chat_template"),
        *("fewshot_as_multiturn", "gen_kwargs", "verbosity", "predict_only", "confirm_run_unsafe_code", "metadata"),
    )
    results = evaluate_model(
        config.model_args["pretrained"],
        find_tasks(config.tasks, manager),
        backend=backend,
        model_args=config.model_args,
        task_manager=manager,
        evaluation_tracker=tracker,
        **{name: getattr(config, name) for name in passed_on},
        **config.cache_requests,
        **dict(zip(seed_names, seeds, strict=True)),
    )
    if results is None:
        return None, tracker
    tracker.general_config_tracker.model_source = config.model
    samples = results.pop("samples") if config.log_samples else None
    if config.show_config:
        print(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, own in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=own)
    _print(config, results)
    for service in services:
        _send(service, results, samples)
    if tracker.push_results_to_hub or tracker.push_samples_to_hub:
        tracker.recreate_metadata_card()
    return results, tracker


def find_tasks(names: Sequence[str], manager: TaskManager) -> list[str]:
    """
    The names of tasks, and paths of YAML files, that `names` stand for: names, patterns of names, paths of YAML files,
    patterns of such paths, folders of YAML files.

    Raises:
        UserError: a name stands for nothing, or a file defines nothing.
    """
    found, missing = {}, []
    for name in names:
        files, matches = [], []
        if name.endswith((".yaml", ".yml")):
            files = sorted(glob.glob(str(Path(name).absolute())))
        elif not (matches := manager.match_tasks([name])):
            files = sorted(map(str, Path(name).absolute().glob("*.yaml"))) if Path(name).is_dir() else []
        for file in files:
            _check(file)
        found |= dict.fromkeys(files or matches)
        missing += [] if files or matches else [name]
    if missing:
        raise UserError(f"Tasks not found: {', '.join(missing)}; see mhmoe eval --help")
    return list(found)


def _check(file: str) -> None:
    check_file(Path(file), None)
    try:
        entry = TaskIndex.entry_from_path(Path(file))
    except Exception as error:  # of YAML, of what it includes, of lm-eval
        raise UserError(f"{file}: {type(error).__name__}: {one_line(error)}; see mhmoe eval --help") from error
    if entry is None:
        raise UserError(f"{file}: defines no task and no group; see mhmoe eval --help")


def _services(config: EvaluatorConfig) -> list[WandbLogger | TrackioLogger]:
    services = []
    for flag, make in (
        ("wandb_args", lambda: WandbLogger(config.wandb_args, config.wandb_config_args)),
        ("trackio_args", lambda: TrackioLogger(config.trackio_args)),
    ):
        if getattr(config, flag):
            try:
                services.append(make())
            except Exception as error:  # not installed, no account, wrong arguments: each has exceptions of its own
                raise UserError(f"--{flag}: cannot be used ({one_line(error)})") from error
    return services


def _send(service: WandbLogger | TrackioLogger, results: dict[str, Any], samples: dict[str, Any] | None) -> None:
    try:
        service.post_init(results)
        service.log_eval_result()
        if samples:
            service.log_eval_samples(samples)
        (service.run if isinstance(service, WandbLogger) else service).finish()
    except Exception as error:  # the results are saved and printed, and should not end in a traceback
        logger.warning("%s: the results could not be sent (%s)", type(service).__name__, one_line(error))


def _print(config: EvaluatorConfig, results: dict[str, Any]) -> None:
    batch_sizes = ",".join(map(str, results["config"]["batch_sizes"]))
    model_args = {key: value for key, value in config.model_args.items() if key != "trust_remote_code"}
    print(
        f"{config.model} ({model_args}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}, "
        f"num_fewshot: {config.num_fewshot}, batch_size: {config.batch_size}{f' ({batch_sizes})' * bool(batch_sizes)}"
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
