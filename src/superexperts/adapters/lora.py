"""LoRA on chosen experts, on shared experts or on attention, as PEFT adapters.

Saving, loading, merging and disabling an adapter are PEFT's. Chosen experts get the layer of `layer.py`; shared experts
and attention are ordinary linear maps and get PEFT's own layer. Which experts are adapted is a field of the adapter's
adapter_config.json: the paths of their banks and their numbers. No name is ever matched by how it begins.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from superexperts.adapters.files import check_fits, check_keys, one_line, same_values
from superexperts.adapters.fitting import read_fitting, require_loadable, start_without_record, starts_from_base
from superexperts.adapters.layer import RENAMED_BY_PEFT, ExpertLoraConfig, linears
from superexperts.adapters.spelling import PREFIX
from superexperts.core.errors import DataError, Field, ModelError, OptionError
from superexperts.core.types import ExpertKey, key_name, key_order
from superexperts.models.banks import Bank, check_experts, find_banks
from superexperts.models.experts import DOWN, GATE, UP

__all__ = [
    "attach",
    "attach_attention",
    "attach_experts",
    "detach",
    "load_adapter",
    "quiet",
    "shared_path",
    "start_of",
    "trainable_parameters",
]


_START = "superexperts_start"
"""The attribute of a base model that `start_of` returns."""

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
    """Puts one fresh adapter on everything named, and freezes everything else.

    `experts`: the `projections` of these experts; only layers that hold one of them are wrapped. `attention`: every
    linear map of every layer's attention. `target`: every linear map whose whole path matches this regular expression.
    `ranks` and `alphas` replace r and alpha for single experts. The model is changed in place; `.unload()` of the
    result restores it. `ExpertsError` for an expert that the model does not have, `ModelError` for attention that it
    does not declare, `OptionError` for a `target` that matches nothing.
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
    """PEFT's pattern (a path) for each expert that has a separate value."""
    strangers = [key_name(key) for key in values or {} if key not in paths]
    if strangers:
        raise OptionError(f"{strangers[0]} is not adapted; name an expert of ", Field("experts"), field=field)
    return {paths[key]: value for key, value in (values or {}).items()}


def _attention(model: nn.Module) -> list[str]:
    """Paths of the linear maps in what the model's class declares as its attention (`can_record_outputs`).

    That finds latent attention (q_a_proj, kv_a_proj_with_mqa, kv_b_proj, ...) as well as plain q, k, v and o.
    """
    declared: Any = cast(Any, model).can_record_outputs.get("attentions", ())
    declared = declared if isinstance(declared, list | tuple) else (declared,)
    # In a few families the class is wrapped in an OutputRecorder of transformers.
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
    """Paths of the linear maps, the output head excepted, that match a regular expression as a whole."""
    head = cast(Any, model).get_output_embeddings()
    paths = [
        path for path, linear in linears(model).items() if linear is not head and re.fullmatch(target, path) is not None
    ]
    if not paths:
        some = next((path for path in reversed(linears(model)) if "." in path), "none")
        raise OptionError(f"{target!r} matches no linear map; paths are like {some}", field="target")
    return paths


def _attach(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    # Both our layer and PEFT's draw A on the CPU, so its generator is the only one to seed.
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, model), config))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses six warnings of PEFT 0.21 and torch that do not apply here.

    They are about: patterns for single experts, which our layer reads; missing keys, which `load_adapter` makes an
    error; matrices of size 0, whose keys are then reported; a base model that has another name than its folder; tied
    weights, which `export` unties; and an attribute of transformers that was renamed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*_pattern keys did not match.*\.\d", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def shared_path(model: nn.Module, bank: Bank) -> str:
    """Path of the shared experts' MLP next to a bank that has shared experts."""
    block = bank.path.rpartition(".")[0]
    for name, sibling in model.get_submodule(block).named_children():
        if any(module is bank.shared_down for module in sibling.modules()):
            return f"{block}.{name}"
    raise AssertionError("`check_experts` refuses shared experts that a model does not have")


def detach(model: nn.Module) -> None:
    """Removes every adapter layer from a model, also those of an adapter that was only partly attached.

    What an adapter's start took out of the base's weights is put back, up to one rounding.
    """
    start = vars(model).pop(_START, {})
    for path, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # whole modules, and rows of the embeddings
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], module.original_module)
    for path, module in list(model.named_modules()):
        # PEFT nests one wrapper per parameter of a bank; `get_base_layer` of the outermost returns the bank itself.
        if isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer"):
            base: Any = cast(Any, module).get_base_layer()
            if (key := f"{PREFIX}{path}.lora_A.weight") in start:
                (scaling,) = cast(Any, module).scaling.values()
                change = scaling * start[key.replace(".lora_A.", ".lora_B.")] @ start[key]
                base.weight.data = (base.weight.data + change).to(base.weight.dtype)
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], base)
    vars(model).pop("peft_config", None)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- loading ------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: Path, field: str = "adapter", name: str = "default") -> PeftModel:
    """Puts a saved adapter on the model, frozen and in evaluation mode; plain PEFT adapters load as well.

    Every key of the file must be used, every module of the adapter must get its keys, and the values must be those of
    the file. Otherwise the model stays as it was, and the error is `DataError` (the file is broken) or `ModelError`
    (the adapter belongs to another model) about `field`. On a PeftModel the adapter is added under another `name`;
    `set_adapter` chooses which adapters are active.
    """
    several = isinstance(model, PeftModel)
    adapted: Any = model
    base = adapted.get_base_model() if several else model
    config, saved = read_fitting(base, folder, field)
    require_loadable(saved, folder, field)
    if several and name in adapted.peft_config:
        raise OptionError(f"the model has an adapter {name!r} already; load {folder} under another name", field=field)
    check_fits(base, config, folder, field)
    if reason := start_without_record(config):
        raise DataError(f"{folder}: {reason}", field=field)
    if config.layer_replication:  # the layers could not be taken out again
        raise DataError(f"{folder} uses layers twice (layer_replication); use it with PEFT alone", field=field)
    config.inference_mode = True
    try:
        with quiet():
            if several:
                adapted.add_adapter(name, config)
            else:
                adapted = get_peft_model(adapted, config, adapter_name=name)
            if starts_from_base(config):
                start = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
                vars(base)[_START] = {key: tensor.clone() for key, tensor in start.items()}
            set_peft_model_state_dict(adapted, saved, adapter_name=name)
        found = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        check_keys(found, saved, folder, field, same=same_values)
    except (RuntimeError, ValueError, TypeError, KeyError, DataError) as error:  # wrong sizes, targets or keys
        if several:
            _remove(adapted, name)
        else:
            detach(model)
        if isinstance(error, DataError):
            raise
        raise ModelError(
            f"{folder} does not fit this model ({one_line(error)}); give the adapter's own model", field=field
        ) from error
    return cast(PeftModel, adapted.eval())


def start_of(adapted: PeftModel) -> Mapping[str, Tensor] | None:
    """The adapter's tensors as it began, if that changed the base's weights; with them the model is the base."""
    start: Mapping[str, Tensor] | None = vars(adapted.get_base_model()).get(_START)
    return start


def _remove(model: PeftModel, name: str) -> None:
    """Removes one of several adapters, also one that was only partly added."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)
    model.peft_config.pop(name, None)
