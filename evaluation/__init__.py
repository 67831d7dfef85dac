"""lm-eval's tasks, and statistics of the routing. What a name below needs is imported with the name."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .evaluate import TASKS_FOLDER, evaluate_model
    from .patch_routing import PatchRouting, save_patch_figure
    from .routing import ExpertCounts, RoutingRecorder
    from .routing_analysis import analyse_routing

__all__ = [
    "TASKS_FOLDER",
    "ExpertCounts",
    "PatchRouting",
    "RoutingRecorder",
    "analyse_routing",
    "evaluate_model",
    "save_patch_figure",
]
HOMES = {
    "TASKS_FOLDER": "evaluate",
    "evaluate_model": "evaluate",
    "ExpertCounts": "routing",
    "PatchRouting": "patch_routing",
    "save_patch_figure": "patch_routing",
    "RoutingRecorder": "routing",
    "analyse_routing": "routing_analysis",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
