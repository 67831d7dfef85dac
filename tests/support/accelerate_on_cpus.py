"""Lets accelerate spread a model over CPU processes, which it does over accelerators alone: on CPUs it refuses tensor
parallelism, and with FSDP would silently give every process the whole model. `python accelerate_on_cpus.py MODULE ...`
runs a module so, as `python -m MODULE ...` would."""

import runpy
import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env


def spread_over_cpus() -> None:
    init = AcceleratorState.__init__

    def init_and_shard(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        asked = fsdp_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if asked and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_and_shard
    # what accelerate asks of processes that are to share a model's tensors
    Accelerator.multi_device = property(lambda self: self.use_distributed and self.parallelism_config is not None)


if __name__ == "__main__":
    spread_over_cpus()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
