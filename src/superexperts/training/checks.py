"""What can be wrong with the settings of a training by themselves, without looking at a file."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

from superexperts.core.errors import Field, OptionError
from superexperts.core.settings import require, require_device, require_positive, require_seed
from superexperts.training.by_expert import values_by_expert

if TYPE_CHECKING:
    from superexperts.training.train import TrainConfig

__all__ = ["PROJECTIONS", "check_settings"]

PROJECTIONS = ("gate", "up", "down")


def check_settings(config: TrainConfig) -> None:
    """`OptionError` for a value that is out of range, or that does not fit the other settings."""
    if config.experts is None and not config.attention and config.target is None:
        what_to_do = (Field("attention"), ", or ", Field("target"), " with a regular expression")
        raise OptionError("missing; give an expert set, ", *what_to_do, field="experts")
    require_device(config.device)
    require_seed(config.seed)
    for name in ("r", "alpha", "learning_rate", "epochs", "batch_size", "accumulation", "max_length"):
        value = getattr(config, name)
        require_positive(name, value)
    for name in ("eval_steps", "patience", "checkpoint_steps"):
        value = getattr(config, name)
        require(value >= 0, name, value, "is negative; give 0 or more")
    for name in ("dropout", "warmup", "eval_share"):
        value = getattr(config, name)
        require(0 <= value < 1, name, value, "is out of range; give a share from 0 to below 1")
    parts = config.projections.split(",")
    odd = ",".join(part for part in parts if part not in PROJECTIONS)
    require(set(parts) <= set(PROJECTIONS), "projections", odd, f"is unknown; choose from {','.join(PROJECTIONS)}")
    require(len(set(parts)) == len(parts), "projections", config.projections, "names one twice; give each once")
    if config.target is not None:
        try:
            re.compile(config.target)
        except re.error as error:
            raise OptionError(
                f"{config.target!r} is not a regular expression ({error}); fix it", field="target"
            ) from error
    values_by_expert(config.ranks, "ranks")
    values_by_expert(config.alphas, "alphas")
    _check_evaluation(config)
    if config.resume and not config.checkpoint_steps:
        raise OptionError("needs ", Field("checkpoint_steps"), " over 0", field="resume")
    if config.report_to != "none":
        installed = importlib.util.find_spec(config.report_to) is not None
        require(installed, "report_to", config.report_to, f"is not installed; run pip install {config.report_to}")


def _check_evaluation(config: TrainConfig) -> None:
    both = config.eval_data is not None and config.eval_share > 0
    clash = ("cannot be combined with ", Field("eval_data"), "; give one of the two")
    require(not both, "eval_share", config.eval_share, *clash)
    if config.eval_data is None and not config.eval_share:
        for name in ("eval_steps", "patience"):
            what_to_do = ("needs rows to evaluate; give ", Field("eval_data"), " or ", Field("eval_share"))
            require(not getattr(config, name), name, getattr(config, name), *what_to_do)
