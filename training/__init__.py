from .data import causal_batch, load_file, load_hub_split, pack
from .pretrain import PretrainArguments, pretrain
from .quality import METRIC_FOLDER, TokenQuality, token_predictions
from .routing_callback import RoutingCallback
from .train import TextArguments, measured, train
from .trainer import MHMoETrainer, RouterBiasCallback


__all__ = [
    "METRIC_FOLDER",
    "MHMoETrainer",
    "PretrainArguments",
    "RouterBiasCallback",
    "RoutingCallback",
    "TextArguments",
    "TokenQuality",
    "causal_batch",
    "load_file",
    "load_hub_split",
    "measured",
    "pack",
    "pretrain",
    "token_predictions",
    "train",
]
