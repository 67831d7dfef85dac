from .evaluate import TASKS_FOLDER, evaluate_model
from .routing import ExpertCounts, RoutingRecorder
from .routing_analysis import analyse_routing


__all__ = ["TASKS_FOLDER", "ExpertCounts", "RoutingRecorder", "analyse_routing", "evaluate_model"]
