"""The engine: one loop for every model and task. It imports neither."""

from train.engine.config import ConfigError, TrainingConfig, parse
from train.engine.evaluation import Predictor
from train.engine.summary import Results
from train.engine.trainer import Task, Trainer

__all__ = ["ConfigError", "Predictor", "Results", "Task", "Trainer", "TrainingConfig", "parse"]
