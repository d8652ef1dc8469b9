"""LoRA on chosen experts, on shared experts or on attention, as PEFT adapters.

Saving, loading, merging and disabling an adapter are PEFT's. Chosen experts get the layer of `lora_layer.py`; shared
experts and attention are ordinary linear maps and get PEFT's own. Which experts are adapted is a field of the adapter's
own adapter_config.json, by the bank's path and the experts' numbers; no name is ever matched by its beginning.
"""

from __future__ import annotations

import contextlib
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from superexperts.adapters.layer import RENAMED_BY_PEFT, ExpertLoraConfig, linears
from superexperts.checkpoints.source import CONFIG_FILE
from superexperts.core.errors import DataError, Field, ModelError, OptionError
from superexperts.core.runs import read_json
from superexperts.core.types import ExpertKey, key_name, key_order
from superexperts.models.banks import Bank, check_experts, find_banks
from superexperts.models.experts import DOWN, GATE, UP, down_weight, is_bank

__all__ = [
    "attach",
    "attach_attention",
    "attach_experts",
    "check_home",
    "check_keys",
    "detach",
    "load_adapter",
    "read_adapter",
    "read_fields",
    "read_tensors",
    "shared_path",
    "trainable_parameters",
]

WEIGHTS_FILE = "adapter_model.safetensors"


# ---- putting adapters on a model ----------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    *,
    experts: Collection[ExpertKey] = (),
    attention: bool = False,
    target: str | None = None,
    projections: Sequence[str] = (GATE, UP, DOWN),
    r: int,
    alpha: float,
    dropout: float,
    seed: int,
    rslora: bool = False,
    ranks: Mapping[ExpertKey, int] | None = None,
    alphas: Mapping[ExpertKey, float] | None = None,
) -> PeftModel:
    """Puts a fresh adapter on all that is named, in one, and freezes everything else.

    `experts`: the chosen experts' `projections`; only layers that hold one are wrapped. `attention`: every linear map
    of every layer's attention. `target`: every linear map whose whole path the regular expression matches. `ranks` and
    `alphas` replace r and alpha for single experts. The model is changed in place; `.unload()` of the result gives it
    back. `ExpertsError` for an expert that the model does not have, `ModelError` for attention that it does not
    declare, `OptionError` for a `target` that matches nothing.
    """
    routed: dict[str, list[int]] = {}
    shared: list[str] = []
    paths: dict[ExpertKey, str] = {}
    if experts:
        banks = {bank.layer: bank for bank in find_banks(model)}
        check_experts(banks.values(), experts)
        for key in sorted(experts, key=key_order):
            layer, expert = key
            if expert == "shared":
                paths[key] = shared_path(model, banks[layer])
                shared.append(paths[key])
            else:
                paths[key] = f"{banks[layer].path}.{expert}"
                routed.setdefault(banks[layer].path, []).append(expert)
    maps = [*(_attention(model) if attention else ()), *(_matched(model, target) if target is not None else ())]
    maps = [path for path in dict.fromkeys(maps) if not any(path.startswith(f"{block}.") for block in shared)]
    hidden = [path for path in maps if path.rpartition(".")[2] in RENAMED_BY_PEFT]
    around = dict.fromkeys(path.rpartition(".")[0] for path in hidden)
    common: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": _patterns(ranks, paths, "ranks"),
        "alpha_pattern": _patterns(alphas, paths, "alphas"),
        "target_modules": [*routed, *shared, *around, *(path for path in maps if path not in hidden)],
        "task_type": "CAUSAL_LM",
    }
    if routed or shared or hidden:
        return _attach(
            model,
            ExpertLoraConfig(experts=routed, shared=shared, linears=hidden, projections=list(projections), **common),
            seed,
        )
    return _attach(model, LoraConfig(**common), seed)  # which plain PEFT loads


def attach_experts(
    model: nn.Module, experts: Collection[ExpertKey], *, r: int, alpha: float, dropout: float, seed: int
) -> PeftModel:
    """`attach` for chosen experts alone."""
    return attach(model, experts=experts, r=r, alpha=alpha, dropout=dropout, seed=seed)


def attach_attention(model: nn.Module, *, r: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """`attach` for attention alone."""
    return attach(model, attention=True, r=r, alpha=alpha, dropout=dropout, seed=seed)


def _patterns(values: Mapping[ExpertKey, Any] | None, paths: Mapping[ExpertKey, str], field: str) -> dict[str, Any]:
    """PEFT's pattern for each expert that has a value of its own."""
    strangers = [key_name(key) for key in values or {} if key not in paths]
    if strangers:
        raise OptionError(f"{strangers[0]} is not adapted; name an expert of ", Field("experts"), field=field)
    return {paths[key]: value for key, value in (values or {}).items()}


def _attention(model: nn.Module) -> list[str]:
    """Paths of the linear maps of what the model's class declares as its attention (`can_record_outputs`), so that
    latent attention (q_a_proj, kv_a_proj_with_mqa, kv_b_proj, ...) and plain q, k, v, o are both found."""
    declared: Any = cast(Any, model).can_record_outputs.get("attentions", ())
    declared = declared if isinstance(declared, list | tuple) else (declared,)
    # An OutputRecorder of transformers wraps the class in a few families.
    classes = tuple(kind if isinstance(kind, type) else kind.target_class for kind in declared)
    paths = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, classes)
        for name in linears(cast(nn.Module, module))
    ]
    if not paths:
        raise ModelError(
            f"{type(model).__name__} declares no attention with linear maps; give ",
            Field("experts"),
            " instead",
            field="attention",
        )
    return paths


def _matched(model: nn.Module, target: str) -> list[str]:
    """Paths of the linear maps that a regular expression matches from the first letter to the last."""
    head = cast(Any, model).get_output_embeddings()
    paths = [
        path for path, linear in linears(model).items() if linear is not head and re.fullmatch(target, path) is not None
    ]
    if not paths:
        some = next((path for path in reversed(linears(model)) if "." in path), "none")
        raise OptionError(f"{target!r} matches no linear map; paths are like {some}", field="target")
    return paths


def _attach(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng(devices=[]), quiet():  # A is drawn on the CPU, by our layer and by PEFT's
        torch.default_generator.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, model), config))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without five warnings of PEFT 0.21 and torch: of an attribute of transformers that has a new name; of missing
    keys, which `load_adapter` makes an error; of patterns for single experts, which our layer reads; of a model's other
    name; of matrices of size 0, whose keys have no home then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*_pattern keys did not match.*\.\d", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def shared_path(model: nn.Module, bank: Bank) -> str:
    """Path of the shared experts' MLP beside a bank."""
    block = bank.path.rpartition(".")[0]
    for name, sibling in model.get_submodule(block).named_children():
        if any(module is bank.shared_down for module in sibling.modules()):
            return f"{block}.{name}"
    raise AssertionError("`check_experts` lets no shared expert through that is not there")


def detach(model: nn.Module) -> None:
    """Takes every adapter layer off a model, half-done ones as well; without any, nothing happens."""
    for path, module in list(model.named_modules()):
        # PEFT nests a wrapper for each parameter of a bank; the outermost gives the bank itself.
        if isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer"):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], cast(Any, module).get_base_layer())
    vars(model).pop("peft_config", None)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- loading ------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: Path, field: str = "adapter", name: str = "default") -> PeftModel:
    """Puts a saved adapter on the model, frozen, in evaluation mode; plain PEFT adapters load as well.

    Every key of the file must have found its home and every module of the adapter its keys, value for value;
    otherwise `DataError` (the file is broken) or `ModelError` (it is another model's), and the model is as it was.
    On a PeftModel it is one adapter more, under a `name` of its own; `set_adapter` says which of them act.
    """
    config, saved = read_adapter(folder, field)
    if any(re.search(r"\.experts\.\d+\.", name) for name in saved):
        raise DataError(
            f"{folder} has one key for each expert, as engines read it; `superexperts import` it", field=field
        )
    adapted: Any = model
    more = isinstance(model, PeftModel)
    if more and name in adapted.peft_config:
        raise OptionError(f"the model has an adapter {name!r} already; load {folder} under another name", field=field)
    check_home(adapted.get_base_model() if more else model, config, folder, field)
    try:
        with quiet():
            if more:
                adapted.add_adapter(name, config)
                adapted.load_adapter(str(folder), name)
            else:
                adapted = PeftModel.from_pretrained(adapted, str(folder), adapter_name=name, config=config)
        found = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        check_keys(found, saved, folder, field, same=_same)
    except (RuntimeError, ValueError) as error:  # sizes differ; no target module was found; keys are not those
        if more:
            _take_off(adapted, name)
        else:
            detach(model)
        if isinstance(error, DataError):
            raise
        raise ModelError(
            f"{folder} does not fit this model ({_line(error)}); give its own model", field=field
        ) from error
    return cast(PeftModel, adapted.eval())


def _take_off(model: PeftModel, name: str) -> None:
    """One adapter of several, a half-done one as well."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)
    model.peft_config.pop(name, None)


def check_keys(
    found: Mapping[str, Any],
    saved: Mapping[str, Any],
    folder: Path,
    field: str,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """`DataError` unless what the adapter on the model holds and what the file holds are the same under each key."""
    missing, homeless = sorted(found.keys() - saved.keys()), sorted(saved.keys() - found.keys())
    wrong = [name for name, value in found.items() if name in saved and not same(value, saved[name])]
    for names, what in ((missing, "are missing"), (homeless, "have no home in the model"), (wrong, "did not load")):
        if names:
            some = ", ".join(names[:2])
            raise DataError(
                f"{len(names)} weights of {folder} {what} ({some}, ...); save the adapter again", field=field
            )


def read_adapter(folder: Path, field: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration (ours where it names experts) and tensors; `DataError` where they cannot be read."""
    fields = read_fields(folder, field)
    try:
        config = ExpertLoraConfig(**fields) if "experts" in fields else LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG_FILE}: {_line(error)}; repair it", field=field) from error
    for field, good in _KINDS.items():  # PEFT takes anything, and fails somewhere with it
        value = getattr(config, field, None)
        if field in fields and not good(value):
            raise DataError(f"{folder / CONFIG_FILE}: {field!r} is {str(value)[:60]}; repair it", field=field)
    return config, read_tensors(folder, field)


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _by_pattern(value: Any, kind: Callable[[Any], bool]) -> bool:
    try:
        return isinstance(value, dict) and all(map(re.compile, value)) and all(map(kind, value.values()))
    except re.error:
        return False


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "r": _whole,
    "lora_alpha": _number,
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "use_rslora": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _by_pattern(value, _whole),
    "alpha_pattern": lambda value: _by_pattern(value, _number),
    "experts": lambda value: isinstance(value, dict) and all(
        isinstance(own, list) and len(set(map(str, own))) == len(own) and all(type(e) is int and e >= 0 for e in own)
        for own in value.values()
    ),
    "shared": _words,
    "linears": _words,
    "projections": lambda value: _words(value) and set(value) <= {GATE, UP, DOWN},
}  # fmt: skip
"""What may stand in fields of adapter_config.json."""


def read_fields(folder: Path, field: str) -> dict[str, Any]:
    """adapter_config.json as it is."""
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(f"{folder} has no {CONFIG_FILE}; give the folder `adapter` that train wrote", field=field)
    fields = read_json(folder / CONFIG_FILE, field)
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise DataError(f"{folder / CONFIG_FILE} describes no LoRA adapter; give one that is", field=field)
    return fields


def read_tensors(folder: Path, field: str) -> dict[str, Tensor]:
    """adapter_model.safetensors as it is."""
    try:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder / WEIGHTS_FILE} cannot be read ({_line(error)}); save the adapter again", field=field
        ) from error
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken is not None:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: {broken} is not finite; train again with a lower ",
            Field("learning_rate"),
            field=field,
        )
    return tensors


def check_home(model: nn.Module, config: LoraConfig, folder: Path, field: str) -> None:
    """Every bank, shared MLP and expert number that the adapter names must be in the model, and every pattern for a
    rank or an alpha must name something that is adapted."""
    if not isinstance(config, ExpertLoraConfig):
        return
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            modules[path] = module.get_base_layer()
    for path, experts in config.experts.items():
        if path not in modules or not is_bank(modules[path]):
            raise ModelError(
                f"{folder} is for experts at {path!r}, which this model has not; give its own", field=field
            )
        count = down_weight(modules[path]).shape[0]
        if not experts or max(experts) >= count:
            raise ModelError(
                (
                    f"{folder} is for expert {max(experts, default=None)} of {path!r}, which has experts "
                    f"0..{count - 1} here; give its own model"
                ),
                field=field,
            )
    for what, paths in (("a shared expert", config.shared), ("a linear map", config.linears)):
        for path in paths:
            if path not in modules:
                raise ModelError(f"{folder} is for {what} at {path!r}, which this model has not", field=field)
    for path in config.target_modules or ():
        if path in modules and is_bank(modules[path]) and path not in config.experts:
            raise DataError(f"{folder} targets {path!r} and names no expert of it; repair {CONFIG_FILE}", field=field)
    own = [f"{path}.{expert}" for path, experts in config.experts.items() for expert in experts]
    own += [f"{expert}.{projection}" for expert in own for projection in config.projections]
    places = [*own, *linears(model), *config.shared, *(f"{path}.weight" for path in config.linears)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", place) for place in places):  # as PEFT matches them
                raise DataError(
                    f"{folder}: {field} is for {pattern!r}, which is not adapted; repair {CONFIG_FILE}", field=field
                )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.float().cpu(), b.float().cpu()))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
