from .arguments import PretrainArguments, TrainArguments
from .data import causal_batch, load_file, load_hub_split, pack
from .narrowing import NarrowingCallback
from .pretrain import pretrain
from .quality import METRIC_FOLDER, TokenQuality, token_predictions
from .routing_callback import RoutingCallback
from .run import measured
from .streaming import TextStream
from .teacher import Teacher
from .train import train
from .trainer import MHMoETrainer, RouterBiasCallback


__all__ = [
    "METRIC_FOLDER",
    "MHMoETrainer",
    "NarrowingCallback",
    "PretrainArguments",
    "RouterBiasCallback",
    "RoutingCallback",
    "Teacher",
    "TextStream",
    "TokenQuality",
    "TrainArguments",
    "causal_batch",
    "load_file",
    "load_hub_split",
    "measured",
    "pack",
    "pretrain",
    "token_predictions",
    "train",
]
