"""An adapter's two files, adapter_config.json and adapter_model.safetensors: reading, checking and writing them."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from superexperts.adapters.layer import ExpertLoraConfig, linears
from superexperts.adapters.spelling import plain_keys
from superexperts.checkpoints.source import CONFIG_FILE, ModelSource
from superexperts.core import errors
from superexperts.core.console import note
from superexperts.core.errors import DataError, ModelError
from superexperts.core.runs import read_json, write_text
from superexperts.models.experts import down_weight, is_bank

__all__ = [
    "MLX",
    "WEIGHTS_FILE",
    "adapter_config",
    "check_fits",
    "check_keys",
    "order_config",
    "read_adapter",
    "read_fields",
    "read_tensors",
    "write_adapter",
]

WEIGHTS_FILE = "adapter_model.safetensors"
MLX_WEIGHTS_FILE = "adapters.safetensors"
MLX = "lora_parameters"
"""The field of adapter_config.json that only mlx-lm writes."""
SHOWN = 2
"""Most keys that a message names."""


# ---- reading ------------------------------------------------------------------------------------------------------


def _different(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("named twice")
    return values


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(str(error)) from error
    return text


Expression = Annotated[str, AfterValidator(_expression)]


class _Fields(BaseModel, strict=True):
    """Accepted values of the fields of adapter_config.json that are used here. PEFT takes anything and fails later."""

    r: PositiveInt = 1
    lora_alpha: FiniteFloat = 1
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    use_rslora: bool = False
    rank_pattern: dict[Expression, PositiveInt] = {}
    alpha_pattern: dict[Expression, FiniteFloat] = {}
    experts: dict[str, Annotated[list[NonNegativeInt], AfterValidator(_different)]] = {}
    shared: list[str] = []
    linears: list[str] = []
    projections: list[Literal["gate_proj", "up_proj", "down_proj"]] = []


def read_adapter(folder: Path, field: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors; the configuration is an `ExpertLoraConfig` if it names experts.

    Keys are spelled as PEFT saves them, whatever program wrote them. `DataError` about `field` if they cannot be read.
    """
    fields = read_fields(folder, field)
    if MLX in fields:
        raise DataError(f"{folder} is in the layout of mlx-lm; import it first", field=field)
    return adapter_config(fields, folder, field), read_tensors(folder, field)


def adapter_config(fields: Mapping[str, Any], folder: Path, field: str) -> LoraConfig:
    """PEFT's configuration with the fields of adapter_config.json; `DataError` about `field` for a wrong value.

    As in PEFT, fields that its version does not know are left out with a note.
    """
    kind = ExpertLoraConfig if "experts" in fields else LoraConfig
    known = {entry.name for entry in dataclasses.fields(kind) if entry.init}
    if unknown := sorted(fields.keys() - known - {"peft_version"}):
        note(f"{field}: {CONFIG_FILE} has fields that this version of PEFT does not know: {', '.join(unknown)}")
    try:
        config = kind(**{name: value for name, value in fields.items() if name in known})
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG_FILE}: {one_line(error)}; repair it", field=field) from error
    try:
        _Fields.model_validate({name: getattr(config, name) for name in _Fields.model_fields if name in fields})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        value = str(getattr(config, name))[:60]
        raise DataError(f"{folder / CONFIG_FILE}: {name!r} is {value}; repair it", field=field) from error
    return config


def read_fields(folder: Path, field: str) -> dict[str, Any]:
    """The content of adapter_config.json, PEFT's or mlx-lm's; `DataError` about `field` if it is not of LoRA."""
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(
            f"{str(folder)!r} has no {CONFIG_FILE}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}", field=field
        )
    fields = read_json(folder / CONFIG_FILE, field)
    if not isinstance(fields, dict) or (fields.get("peft_type") != "LORA" and MLX not in fields):
        kind = fields.get("peft_type") or fields.get("fine_tune_type") if isinstance(fields, dict) else None
        what = f" but {kind!r}" if kind else ""
        raise DataError(
            f"{folder / CONFIG_FILE} does not describe a LoRA adapter{what}; give one that does", field=field
        )
    return fields


def read_tensors(folder: Path, field: str) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors, or of its shards, by key; float8 ones in float32.

    `DataError` about `field` if one is not finite, or a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder, field):
        try:
            with safe_open(str(file), framework="pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file} cannot be read ({one_line(error)}); save the adapter again", field=field
            ) from error
    if not tensors:
        raise DataError(f"{folder} holds no tensor; save the adapter again", field=field)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensors[name] = tensor.float()  # torch computes nothing in float8
        if not tensor.numel():
            raise DataError(
                f"{folder}: {name} has the shape {list(tensor.shape)}, as when a training over several GPUs saves "
                "without gathering its parts; gather them and save the adapter again",
                field=field,
            )
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken is not None:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: {broken} is not finite; train again with a lower ",
            errors.Field("learning_rate"),
            field=field,
        )
    return plain_keys(tensors, str(folder), field)


def _weight_files(folder: Path, field: str) -> list[Path]:
    """adapter_model.safetensors, mlx-lm's adapters.safetensors, or all shards of one."""
    for name in (WEIGHTS_FILE, MLX_WEIGHTS_FILE):
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob("adapter_model-*-of-*.safetensors"))
    if shards:
        count = int(shards[0].stem.rpartition("-")[2])
        if len(shards) != count:
            raise DataError(f"{folder} holds {len(shards)} of {count} shards; fetch the others", field=field)
        return shards
    if (folder / "adapter_model.bin").is_file():
        raise DataError(
            f"{folder} holds its weights as a pickle, adapter_model.bin, which can run code and is not read; save the "
            "adapter as safetensors",
            field=field,
        )
    raise DataError(f"{folder} has no {WEIGHTS_FILE}; save the adapter again", field=field)


# ---- checking -----------------------------------------------------------------------------------------------------


def check_keys(
    found: Mapping[str, Any],
    saved: Mapping[str, Any],
    folder: Path,
    field: str,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """`DataError` unless the adapter on the model (`found`) and the file in `folder` (`saved`) have the same keys, and
    under each key values that are the `same`."""
    missing, left_over = sorted(found.keys() - saved.keys()), sorted(saved.keys() - found.keys())
    wrong = [name for name, value in found.items() if name in saved and not same(value, saved[name])]
    for names, what in ((missing, "are missing"), (left_over, "have no place in the model"), (wrong, "did not load")):
        if names:
            some = ", ".join(names[:SHOWN])
            raise DataError(
                f"{len(names)} weights of {folder} {what} ({some}, ...); save the adapter again", field=field
            )


def check_fits(model: nn.Module, config: LoraConfig, folder: Path, field: str) -> None:
    """Checks that everything an adapter's configuration names is in the model.

    `ModelError` for a bank, a shared expert, a linear map or an expert number that the model does not have;
    `DataError` for a rank or an alpha of something that is not adapted. Plain PEFT adapters are left to PEFT.
    """
    if not isinstance(config, ExpertLoraConfig):
        return
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            modules[path] = module.get_base_layer()
    for path, experts in config.experts.items():
        if path not in modules or not is_bank(modules[path]):
            raise ModelError(
                f"{folder} is for experts at {path!r}, which this model does not have; give the adapter's own model",
                field=field,
            )
        count = down_weight(modules[path]).shape[0]
        if not experts or max(experts) >= count:
            raise ModelError(
                f"{folder} is for expert {max(experts, default=None)} of {path!r}, which has experts 0..{count - 1} "
                "here; give the adapter's own model",
                field=field,
            )
    for what, paths in (("a shared expert", config.shared), ("a linear map", config.linears)):
        for path in paths:
            if path not in modules:
                raise ModelError(
                    f"{folder} is for {what} at {path!r}, which this model does not have; give the adapter's own model",
                    field=field,
                )
    for path in config.target_modules or ():
        if path in modules and is_bank(modules[path]) and path not in config.experts:
            raise DataError(
                f"{folder} targets {path!r} and names none of its experts; repair {CONFIG_FILE}", field=field
            )
    _check_patterns(model, config, folder, field)


def _check_patterns(model: nn.Module, config: ExpertLoraConfig, folder: Path, field: str) -> None:
    experts = [f"{path}.{expert}" for path, numbers in config.experts.items() for expert in numbers]
    projections = [f"{expert}.{projection}" for expert in experts for projection in config.projections]
    weights = [f"{path}.weight" for path in config.linears]
    adapted = [*experts, *projections, *linears(model), *config.shared, *weights]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted):  # as PEFT matches them
                raise DataError(
                    f"{folder}: {setting} is for {pattern!r}, which is not adapted; repair {CONFIG_FILE}", field=field
                )


# ---- writing ------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], source: ModelSource) -> None:
    """Writes the two files, which name the base model as the user named it."""
    config.base_model_name_or_path, config.revision = source.name, source.revision
    config.save_pretrained(str(folder))
    order_config(folder)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def order_config(folder: Path) -> None:
    """Sorts what PEFT keeps as sets, so that the same adapter gives the same bytes of adapter_config.json."""
    fields = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(name), list):
            fields[name].sort()
    write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2, sort_keys=True))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes and devices."""
    return a.shape == b.shape and bool(torch.equal(a.float().cpu(), b.float().cpu()))


def one_line(error: BaseException) -> str:
    """An exception's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
