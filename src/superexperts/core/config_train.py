"""The settings of `train`, and the YAML recipe that holds them; `config.py` has the other commands."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from superexperts.core.errors import DataError, Field, OptionError
from superexperts.core.settings import SeededConfig, Switch, typed
from superexperts.core.settings import require as _require
from superexperts.core.settings import require_device as _require_device
from superexperts.core.settings import require_seed as _require_seed

__all__ = ["PROJECTIONS", "TrainConfig", "read_recipe", "recipe_text"]

PROJECTIONS = ("gate", "up", "down")
NOT_IN_RECIPE = ("recipe", "out", "resume", "checkpoint_steps", "report_to", "json", "device", "trust_remote_code")
"""Where and how a training runs, not what it does; whose code is run is for the person to say who runs it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(SeededConfig):
    """LoRA on only the chosen experts, on attention, or on any linear maps, by supervised fine-tuning.

    Example: superexperts train pocket --data train.json --experts runs/super.json --out runs/lora

    Example: superexperts train --recipe recipes/train/pocket-super.yaml --data train.json --out runs/lora
    """

    recipe: Path | None = None
    """YAML file of these options, such as the recipe.yaml of a former run; options given as well replace its own."""
    data: Path
    """JSON array or JSONL of {question, explain, answer}."""
    experts: str | None = None
    """experts.json or inline: adapt these experts' projections."""
    attention: Switch = False
    """Adapt the attention projections."""
    target: str | None = None
    """Adapt the linear maps whose whole path this regular expression matches."""
    projections: str = "gate,up,down"
    """Which projections of the experts are adapted."""
    out: Path = Path("runs/train")
    """Folder for adapter/ and the training log."""
    r: int = 16
    """LoRA rank."""
    alpha: float = 32
    """LoRA alpha; the update is scaled by alpha / r."""
    ranks: str = ""
    """Ranks of single experts, such as L2E54=32,L3E38=8."""
    alphas: str = ""
    """Alphas of single experts, such as L2E54=64."""
    rslora: Switch = False
    """Scale by alpha / sqrt(r) instead."""
    dropout: float = 0.05
    """Dropout on the LoRA branch's input."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Values of the saved adapter, which is trained in float32; `auto`: as the model's weights in memory."""
    prompt: Literal["plain", "chat"] = "plain"
    """`plain`: Question: ... Answer: ..., as evaluate asks; `chat`: that as the user's message in the chat template."""
    learning_rate: float = 1e-4
    """Peak learning rate; the schedule is cosine."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    epochs: float = 2
    """Passes over the data."""
    batch_size: int = 16
    """Rows per device and forward pass; with --packing, sequences of up to --max-length tokens."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    max_length: int = 1024
    """Longest prompt and response in tokens; longer rows are an error."""
    truncate: Switch = False
    """Cut responses off at --max-length instead; how many is counted."""
    packing: Switch = False
    """Several rows in one sequence of up to --max-length tokens, which do not see each other."""
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    eval_data: Path | None = None
    """Rows that are not trained on, whose loss is measured."""
    eval_share: float = 0
    """Or: share of --data that is set aside for it, chosen by --seed."""
    eval_steps: int = 0
    """Optimiser steps between evaluations; default: once an epoch."""
    patience: int = 0
    """Stop after so many evaluations without a lower loss, and keep the adapter of the lowest; 0: train to the end."""
    checkpoint_steps: int = 50
    """Optimiser steps between checkpoints for --resume; 0: none."""
    resume: Switch = False
    """Go on from the last checkpoint of a killed run of the same settings."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where losses are logged as well; TensorBoard's files go into logs/ of --out."""
    load_in_4bit: Switch = False
    """Keep linear maps outside the adapted layers in 4 bits (needs bitsandbytes)."""
    offload: Switch = False
    """Keep the layers below the lowest adapted one in main memory, or on disk where there is no GPU."""
    allow_unexposed: Switch = False
    """Keep the adapter of an expert that no training token reached, which is an error otherwise."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        some = self.experts is not None or self.attention or self.target is not None
        _require(
            some,
            "experts",
            self.experts,
            "is missing; give an expert set, ",
            Field("attention"),
            ", or ",
            Field("target"),
            " REGEX",
        )
        _require_device(self.device)
        _require_seed(self.seed)
        for option in ("r", "alpha", "learning_rate", "epochs", "batch_size", "accumulation", "max_length"):
            value = getattr(self, option)
            good = 0 < value < math.inf
            _require(good, option, value, "is not positive and finite; give more than 0")
        for option in ("eval_steps", "patience", "checkpoint_steps"):
            value = getattr(self, option)
            _require(value >= 0, option, value, "is negative; give 0 or more")
        for option in ("dropout", "warmup", "eval_share"):
            value = getattr(self, option)
            _require(0 <= value < 1, option, value, "is out of range; give a share in [0, 1)")
        parts = self.projections.split(",")
        good = len(set(parts)) == len(parts) and set(parts) <= set(PROJECTIONS)
        _require(good, "projections", self.projections, f"is unknown; choose from {','.join(PROJECTIONS)}")
        if self.target is not None:
            try:
                re.compile(self.target)
            except re.error as error:
                raise OptionError(
                    f"{self.target!r} is no regular expression ({error}); mend it", field="target"
                ) from error
        for option in ("ranks", "alphas"):
            own_values(getattr(self, option), option)
        both = self.eval_data is not None and self.eval_share > 0
        _require(not both, "eval_share", self.eval_share, "excludes ", Field("eval_data"), "; give one of the two")
        evaluated = self.eval_data is not None or self.eval_share > 0
        for option in ("eval_steps", "patience"):
            needless = evaluated or not getattr(self, option)
            why = ("needs rows to evaluate; give ", Field("eval_data"), " or ", Field("eval_share"))
            _require(needless, option, getattr(self, option), *why)
        _require(
            self.checkpoint_steps > 0 or not self.resume, "resume", True, "needs ", Field("checkpoint_steps"), " over 0"
        )
        if self.report_to != "none":
            there = importlib.util.find_spec(self.report_to) is not None
            _require(there, "report_to", self.report_to, f"is not installed; run pip install {self.report_to}")


def own_values(text: str, field: str) -> dict[str, float]:
    """`L2E54=32,L8shared=8` -> {"L2E54": 32, "L8shared": 8}."""
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(L\d+(?:E\d+|shared))=(\d+(?:\.\d+)?)", part)
        if found is None or not float(found[2]) or (field == "ranks" and "." in found[2]):
            raise OptionError(f"{part!r} is not like L2E54=32; write EXPERT=NUMBER, separated by commas", field=field)
        if found[1] in values:
            raise OptionError(f"{found[1]} is named twice; give each expert one number", field=field)
        values[found[1]] = float(found[2]) if "." in found[2] else int(found[2])
    return values


# ---- recipes ------------------------------------------------------------------------------------------------------


def recipe_text(config: TrainConfig, experts: str | None, comment: str) -> str:
    """Every setting that decides what is trained, as YAML; `experts` stand in it by name instead of by a file."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_RECIPE}
    fields["experts"] = experts
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return f"# {comment}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def read_recipe(file: Path) -> dict[str, Any]:
    """The settings that a recipe holds; `OptionError` names a field that `train` does not have or its wrong type."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file} ({error}); check the path", field="recipe") from error
    except yaml.YAMLError as error:
        raise OptionError(
            f"{file} is not valid YAML ({' '.join(str(error).split())}); mend it", field="recipe"
        ) from error
    if not isinstance(value, Mapping):
        raise OptionError(f"{file} is no mapping of options; write lines like `r: 16`", field="recipe")
    refused = ("recipe", "resume", "trust_remote_code")
    hints = get_type_hints(TrainConfig)
    free = hints.keys() - set(refused)
    settings: dict[str, Any] = {}
    for name, setting in value.items():
        if name not in free:
            raise OptionError(
                f"{file}: {name!r} is no option of train; see superexperts train ", Field("help"), field="recipe"
            )
        try:
            settings[name] = typed(setting, hints[name])
        except ValueError as error:
            raise OptionError(f"{file}: {name}: {error}", field="recipe") from error
    return settings
