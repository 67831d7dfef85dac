from .evaluate import TASKS_FOLDER, evaluate_model
from .routing import ExpertCounts, RoutingRecorder


__all__ = ["TASKS_FOLDER", "ExpertCounts", "RoutingRecorder", "evaluate_model"]
