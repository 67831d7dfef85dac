"""Training a model whose tensors are shared out among processes, with checkpoints that any layout can resume."""

import itertools
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from accelerate.utils.operations import recursively_apply
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mhmoe.errors import UserError, one_line
from mhmoe.intake import parse_json, read_json


def whole(nest):
    """`nest` of dicts and lists with every tensor whole. All processes have to call this together."""
    if isinstance(nest, DTensor):
        return nest.full_tensor()
    if isinstance(nest, dict):
        return {key: whole(item) for key, item in nest.items()}
    return [whole(item) for item in nest] if isinstance(nest, list) else nest


def shared_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, shared out as `like` is, whose shape it has."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


def regrouped(optimizer: dict, scheduler: dict, numbers: list[list[int]]) -> tuple[dict, dict]:
    """
    What `state_dict` gives of an optimizer and of its scheduler, for other groups of the same parameters.

    Args:
        numbers: the new groups, parameters in them by their old numbers.
    """
    old_groups = optimizer["param_groups"]
    group_of = {number: place for place, group in enumerate(old_groups) for number in group["params"]}
    likes = [group_of[members[0]] if members else len(old_groups) - 1 for members in numbers]
    counter = itertools.count()
    groups = [
        {**old_groups[like], "params": [next(counter) for _ in members]}
        for like, members in zip(likes, numbers, strict=True)
    ]
    state = {new: optimizer["state"].get(old) for new, old in enumerate(itertools.chain(*numbers))}
    state = {number: kept for number, kept in state.items() if kept is not None}
    scheduler = {
        key: [value[like] for like in likes] if isinstance(value, list) and len(value) == len(old_groups) else value
        for key, value in scheduler.items()
    }
    return {"state": state, "param_groups": groups}, scheduler


class ShardedTrainer(Trainer):
    """
    [`Trainer`] whose checkpoints are ordinary ones, whole tensors in `model.safetensors` and `optimizer.pt`, also
    where FSDP2, tensor or expert parallelism share these out among processes. So a run resumes on another number of
    processes, or in another layout. Its last save is an ordinary folder always. Two kinds of checkpoints are not:
    FSDP2's with `SHARDED_STATE_DICT`, which FSDP2 on any number of processes reads, and DeepSpeed's.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs):
        strategy = args.save_strategy
        if getattr(model, "is_distributed_loading_by_transformers", False):
            args.save_strategy = SaveStrategy.NO  # or Trainer would refuse to save a checkpoint without this class
        super().__init__(model, args, **kwargs)
        args.save_strategy = strategy

    def evaluation_loop(self, *args, **kwargs):
        if (self.get_tp_size() or 1) > 1:
            self.gather_function = self._gather_each_row_once  # which Trainer takes back when it is through
        return super().evaluation_loop(*args, **kwargs)

    def _gather_each_row_once(self, tensors):
        """As accelerate's `gather_for_metrics`, which would count a row for every process that shares its work."""
        state, copies = self.accelerator.gradient_state, self.get_tp_size()
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def rows_once(gathered: torch.Tensor) -> torch.Tensor:
            return torch.cat(gathered.chunk(self.accelerator.num_processes)[::copies])[:rows]

        return recursively_apply(rows_once, self.accelerator.gather(tensors))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")  # with the other kind, Trainer would save no weights
        super().save_model(output_dir, _internal_call)
        plugin.set_state_dict_type(kind)

    def _shares_out_tensors(self) -> bool:
        """Whether this class has to gather them."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "FULL" not in str(plugin.state_dict_type):
            return False
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def _numbers_in_one_piece(self) -> list[list[int]]:
        """
        The optimizer's parameters by their numbers, in the groups that they are in where nothing is shared out. Where
        something is, Trainer splits these by the processes that share a parameter.
        """
        groups = [group["params"] for group in self.optimizer.param_groups]
        decaying = set(self.get_decay_parameter_names(self.model))
        own = {id(parameter): number for number, parameter in enumerate(itertools.chain(*groups))}
        named = [(name, own.get(id(parameter))) for name, parameter in self.model.named_parameters()]
        named = [(name, number) for name, number in named if number is not None]
        if len(named) != len(own):  # an optimizer of the user's own
            counter = itertools.count()
            return [[next(counter) for _ in group] for group in groups]
        return [[number for name, number in named if (name in decaying) == decay] for decay in (True, False)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._shares_out_tensors():
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            states = regrouped(state, self.lr_scheduler.state_dict(), self._numbers_in_one_piece())
            for kept, name in zip(states, (OPTIMIZER_NAME, SCHEDULER_NAME), strict=True):
                torch.save(kept, Path(output_dir, name))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not self._shares_out_tensors() or any(folder.glob(f"{FSDP_MODEL_NAME}*")):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        shards = set(read_json(index)["weight_map"].values()) if index.exists() else {SAFE_WEIGHTS_NAME}
        weights = (self.model if model is None else model).state_dict()
        for shard in sorted(shards):
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    weights[name].copy_(shared_out(file.get_tensor(name), weights[name]))

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        if checkpoint is None or not self._shares_out_tensors():
            return super()._load_best_model()
        self._load_from_checkpoint(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._shares_out_tensors() or not Path(checkpoint, OPTIMIZER_NAME).is_file():
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, scheduler = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        place = {number: place for place, number in enumerate(itertools.chain(*self._numbers_in_one_piece()))}
        groups, counter = [group["params"] for group in self.optimizer.param_groups], itertools.count()
        numbers = [[place[next(counter)] for _ in group] for group in groups]
        state, scheduler = regrouped(state, scheduler, numbers)
        parameters = list(itertools.chain(*groups))
        for number, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                    values[name] = shared_out(value, parameters[number])  # which is kept for each of its elements
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(scheduler)


def device_defaults() -> dict:
    """Of Trainer's arguments, where there is no accelerator: or processes launched on CPUs would each train alone."""
    if torch.accelerator.is_available():
        return {}
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")  # which knows CPUs by their backend alone
    return {"ddp_backend": "gloo"} if deepspeed else {"use_cpu": True}


def read_distributed_config(given: str) -> DistributedConfig:
    """
    Of JSON, or of a JSON file.

    Raises:
        UserError: it is neither, or does not fit the launched processes.
    """
    try:
        is_file = not given.lstrip().startswith("{")
        fields = read_json(Path(given), "mend it") if is_file else parse_json(given, "JSON", "mend it")
        config = DistributedConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"distributed_config={given}: cannot be used ({one_line(error)})") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    names = ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size")
    sizes = {name: getattr(config, name, None) or 1 for name in names}
    processes = math.prod(sizes.values())
    if processes != launched:
        raise UserError(
            f"distributed_config={given}: its sizes make {processes} processes, but {launched} were launched; give "
            "sizes whose product that is"
        )
    if sizes["pp_size"] > 1:
        raise UserError(f"distributed_config={given}: Trainer knows no pipeline parallelism; leave out pp_size")
    return config


@contextmanager
def refusals_in_one_line(training_args: TrainingArguments) -> Generator[None]:
    """Make a [`UserError`] of what Trainer and accelerate refuse when they are set up."""
    try:
        yield
    except ValueError as error:
        if "ParallelismConfig" in str(error) and training_args.device.type == "cpu":
            raise UserError(
                "distributed_config: accelerate trains with tensor parallelism on accelerators alone; on CPUs, leave "
                "out tp_size, and use fsdp_size, with ep_size beside it for the experts"
            ) from error
        raise UserError(one_line(error)) from error


def check_sharding(trainer: ShardedTrainer, checkpoint: str | None) -> None:
    """
    Whether a run would do what was asked, and can go on from `checkpoint`.

    Raises:
        UserError: accelerate would train copies of the whole model, or the optimizer's state is of another kind.
    """
    for name, enabled in (("fsdp", trainer.is_fsdp_enabled), ("deepspeed", trainer.is_deepspeed_enabled)):
        if (getattr(trainer.args, name) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")) and not enabled:
            raise UserError(
                f"{name}: was asked for, but accelerate would give each of these processes the whole model; on CPUs, "
                """share it out with --distributed_config '{"fsdp_size": 2}', 2 being the number of processes"""
            )
    if checkpoint is None:
        return
    of_deepspeed = any(Path(checkpoint).glob("global_step*"))
    if of_deepspeed and not trainer.is_deepspeed_enabled:
        raise UserError(f"{checkpoint}: DeepSpeed's own checkpoint; resume it as it was launched, with DeepSpeed")
    if trainer.is_deepspeed_enabled and not of_deepspeed:
        raise UserError(f"{checkpoint}: not a checkpoint of DeepSpeed; resume it without DeepSpeed")
    if any(Path(checkpoint).glob(f"{FSDP_MODEL_NAME}*")) and not trainer.is_fsdp_enabled:
        raise UserError(f"{checkpoint}: FSDP's own checkpoint; resume it with FSDP, on any number of processes")
