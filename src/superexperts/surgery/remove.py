"""Removes experts from a checkpoint: their matrices, their rows of the router, and their number in config.json.

The structure of the model is built twice, with all experts and with fewer. The comparison shows which tensors shrink
and which field of the configuration holds their number, so the code needs no names of any family.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import ModelSource
from superexperts.checkpoints.writer import Change, NewTensor, digest_of
from superexperts.core.errors import ExpertsError, Field, ModelError
from superexperts.core.types import ExpertKey, key_name
from superexperts.models.banks import Bank, check_experts, find_banks
from superexperts.models.decoder import decoder_layers, in_layer, num_layers, text_config
from superexperts.models.experts import down_weight
from superexperts.models.hooks import tapped
from superexperts.models.key_mapping import KeyMapping
from superexperts.models.layer_by_layer import Kept, layer_by_layer
from superexperts.models.loading import empty_model, settings_of, structure_of
from superexperts.models.streaming import StreamedModel

__all__ = ["Removal", "check_runs", "plan_removal"]


PROBE = 8
"""Tokens that run through what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """The contents of a checkpoint without the experts."""

    shards: Mapping[str, Sequence[NewTensor]]
    """Every tensor of the shards that change."""
    settings: Mapping[str, Any]
    """The new config.json."""
    field: str
    """The field of config.json that holds the number of experts."""
    changes: tuple[Change, ...]
    """What was removed."""


def plan_removal(source: ModelSource, base: Checkpoint, experts: Collection[ExpertKey]) -> Removal:
    """Plans a removal and reads only what is removed; `ExpertsError` or `ModelError` if the result would not be a model
    of the family."""
    settings = settings_of(source)
    model = structure_of(settings, source)
    banks = find_banks(model, source.field)
    check_experts(banks, experts)
    count = _each_loses(banks, experts)
    key_mapping = KeyMapping(model, base)
    key_mapping.check_complete(model)
    if key_mapping.quantized:
        raise ModelError("'remove' needs weights that are not quantized; use ", Field("mode"), " zero", field="mode")
    _check_ignored(model, banks, key_mapping)
    _check_tables(model, banks, source.field)
    field, fewer = _shrunk(settings, source, banks, count)
    _check_groups(settings, banks, experts)
    before, after = (_shapes(structure) for structure in (model, fewer))
    new: dict[str, NewTensor | None] = {}
    changes: list[Change] = []
    for name, shape in before.items():
        if after.get(name) == shape or name not in key_mapping.sources:
            continue
        bank = next((bank for bank in banks if name.startswith(f"{bank.path.rpartition('.')[0]}.")), None)
        if bank is None:
            raise ModelError(
                f"the number of experts changes {name}, which is in no MoE layer; use ",
                Field("mode"),
                " zero",
                field=source.field,
            )
        gone = [cast(int, expert) for layer, expert in experts if layer == bank.layer]
        kept = [expert for expert in range(bank.num_experts) if expert not in gone]
        dims = [d for d, (x, y) in enumerate(zip(shape, after[name], strict=True)) if x != y]
        if [shape[dim] for dim in dims] != [bank.num_experts]:
            raise ModelError(
                f"{name} has {list(shape)} numbers with {bank.num_experts} experts: which of them belong to which "
                "expert is not known, as where a router can choose something else than these experts; use ",
                Field("mode"),
                " zero",
                field=source.field,
            )
        (dim,) = dims
        changes += _shrink(base, key_mapping, name, dim, kept, gone, new)
    shards = {}
    for file in base.files:
        entries = base.in_file(file)
        if any(entry.key in new for entry in entries):
            tensors = [new.get(entry.key, _as_it_is(entry)) for entry in entries]
            shards[file] = [tensor for tensor in tensors if tensor is not None]
    return Removal(
        shards=shards, settings=_new_settings(base.folder, settings, field, banks[0].num_experts - count),
        field=field, changes=tuple(changes),
    )  # fmt: skip


def _each_loses(banks: Sequence[Bank], experts: Collection[ExpertKey]) -> int:
    """The number of experts that every MoE layer loses; `ExpertsError` if it differs between layers."""
    shared = next((key for key in experts if key[1] == "shared"), None)
    if shared is not None:
        raise ExpertsError(
            f"{key_name(shared)} cannot be removed, only zeroed; use ", Field("mode"), " zero", field="experts"
        )
    lost = Counter(layer for layer, _ in experts)
    numbers = {bank.layer: lost[bank.layer] for bank in banks}
    few, many = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
    if numbers[few] != numbers[many]:
        raise ExpertsError(
            Field("mode"),
            (
                " remove takes as many experts from every MoE layer, since the configuration has one number for "
                f"all, but layer {many} loses {numbers[many]} and layer {few} {numbers[few]}; use "
            ),
            Field("mode"),
            " zero",
            field="experts",
        )
    return numbers[few]


def _shrunk(settings: Any, source: ModelSource, banks: Sequence[Bank], count: int) -> tuple[str, nn.Module]:
    """The field of the configuration that holds the number of experts, and the structure with fewer of them."""
    sizes = {bank.num_experts for bank in banks}
    if len(sizes) > 1:
        raise ModelError(
            f"its MoE layers have {sorted(sizes)} experts, not one number; use ",
            Field("mode"),
            " zero",
            field=source.field,
        )
    (size,) = sizes
    if count >= size:
        raise ExpertsError(
            f"{count} of {size} experts of each layer leave none; use ", Field("mode"), " zero", field="experts"
        )
    text = settings.get_text_config()
    for field, value in text.to_dict().items():
        if type(value) is not int or value != size:
            continue
        changed = copy.deepcopy(settings)
        try:
            setattr(changed.get_text_config(), field, size - count)
            fewer = structure_of(changed, source)
        except (ValueError, RuntimeError, AssertionError, IndexError):  # another field of this value
            continue
        if _only_fewer_experts(banks, fewer, size - count):
            _check_routing(fewer, size - count)
            return field, fewer
    raise ModelError(
        f"no one number of its configuration is that of the experts, {size}, in every layer; use ",
        Field("mode"),
        " zero",
        field=source.field,
    )


def _only_fewer_experts(banks: Sequence[Bank], fewer: nn.Module, count: int) -> bool:
    """Whether a structure has `count` experts in every bank, and is otherwise that of the banks."""
    found = find_banks(fewer)
    if [bank.path for bank in found] != [bank.path for bank in banks]:
        return False
    if any(bank.num_experts != count for bank in found):
        return False
    return all(
        down_weight(one.module).shape[1:] == down_weight(other.module).shape[1:]
        for one, other in zip(banks, found, strict=True)
    )


def _check_routing(model: nn.Module, count: int) -> None:
    """Sends two tokens without values through the router of each layer: the family's own code then fails if it cannot
    choose its top k among so few experts, or cannot split them into groups."""
    for bank in find_banks(model):
        block = model.get_submodule(bank.path.rpartition(".")[0])
        stock = bank.module.forward
        bank.module.forward = lambda x, *_, **__: torch.empty_like(x)
        try:
            hidden = torch.empty(1, 2, text_config(model).hidden_size, device="meta")
            if block is decoder_layers(model, bank.path)[bank.layer]:  # gemma4 has its router in the layer itself
                cast(Any, block).router(hidden[0])
            else:
                with contextlib.suppress(TypeError):  # a block that takes more than hidden states runs in `check_runs`
                    block(hidden)
        except (RuntimeError, ValueError, IndexError) as error:
            why = " ".join(str(error).split())[:120]
            raise ExpertsError(
                f"the family's router does not work with {count} experts ({why}); use ",
                Field("mode"),
                " zero",
                field="experts",
            ) from error
        finally:
            bank.module.forward = stock


def _check_groups(settings: Any, banks: Sequence[Bank], experts: Collection[ExpertKey]) -> None:
    """If a router chooses groups of experts first (`n_group` of DeepSeek-V3), every group must lose the same number."""
    groups = settings.get_text_config().to_dict().get("n_group")
    if type(groups) is not int or groups <= 1:
        return
    for bank in banks:
        size = bank.num_experts // groups
        lost = Counter(cast(int, expert) // size for layer, expert in experts if layer == bank.layer)
        numbers = [lost[group] for group in range(groups)]
        if len(set(numbers)) > 1:
            raise ExpertsError(
                f"the router chooses among {groups} groups of {size} experts first, and layer {bank.layer} loses "
                f"{numbers} of them, so others would change their group; remove as many of each, or use zero",
                field="experts",
            )


def _check_ignored(model: nn.Module, banks: Sequence[Bank], key_mapping: KeyMapping) -> None:
    """`ModelError` if the checkpoint holds layers that the model does not run (for speculative decoding): decoder
    layers beyond the last, or experts under any other name."""
    beyond, layers = in_layer(banks[0].path, banks[0].layer), num_layers(model)

    def is_of_a_layer(key: str) -> bool:
        found = beyond.match(key)
        return (found is not None and int(found[1]) >= layers) or "expert" in key

    more = next(filter(is_of_a_layer, key_mapping.ignored), None)
    if more is not None:
        raise ModelError(
            f"holds layers that the model does not run ({more!a}); the new number of experts would not fit them; use ",
            Field("mode"),
            " zero",
            field=key_mapping.checkpoint.field,
        )


def _check_tables(model: nn.Module, banks: Sequence[Bank], field: str) -> None:
    """`ModelError` for a router that looks experts up by number (DeepSeek-V4's first layers, by token id): for the
    tokens of a removed expert its table has no other."""
    for bank in banks:
        block = bank.path.rpartition(".")[0]
        for name, tensor in model.get_submodule(block).state_dict().items():
            if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
                raise ModelError(
                    f"{block}.{name} is a table of whole numbers, by which experts are chosen: tokens of a removed "
                    "expert would have none; use ",
                    Field("mode"),
                    " zero",
                    field=field,
                )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _as_it_is(entry: Entry) -> NewTensor:
    return NewTensor(key=entry.key, kind=entry.kind, shape=entry.shape, pieces=(entry,))


def _shrink(
    base: Checkpoint, key_mapping: KeyMapping, name: str, dim: int, kept: Sequence[int], gone: Sequence[int],
    new: dict[str, NewTensor | None],
) -> list[Change]:  # fmt: skip
    """Puts the new tensors of a parameter into `new` (None for a key that is removed); returns what was removed."""
    whole = key_mapping.experts_first(name) if dim == 0 else key_mapping.whole(name)
    if whole is not None:
        shape = tuple(len(kept) if d == dim else size for d, size in enumerate(whole.shape))
        pieces: tuple[Entry | Tensor, ...]
        if dim == 0:
            pieces = tuple(whole.row(expert) for expert in kept)
            out = [whole.row(expert) for expert in gone]
        else:
            pieces = (base.read(whole).index_select(dim, torch.tensor(kept)),)
            out = [whole]
        new[whole.key] = NewTensor(key=whole.key, kind=whole.kind, shape=shape, pieces=pieces)
        return [_taken_out(base, entry) for entry in out]
    columns = key_mapping.stacked(name)
    if columns is None or any(len(column) != len(kept) + len(gone) for column in columns):
        raise ModelError(
            f"the checkpoint keeps {name} in an order that cannot be edited; use ",
            Field("mode"),
            " zero",
            field=base.field,
        )
    for column in columns:
        # The remaining experts are renumbered from 0: they take the keys of the first ones, whatever these are called.
        for place, entry in enumerate(column):
            new[entry.key] = None
            if place < len(kept):
                source = column[kept[place]]
                new[entry.key] = NewTensor(key=entry.key, kind=source.kind, shape=source.shape, pieces=(source,))
    return [_taken_out(base, column[expert]) for column in columns for expert in gone]


def _taken_out(base: Checkpoint, entry: Entry) -> Change:
    return Change(
        key=entry.key, file=entry.file, offset=entry.offset, bytes=entry.nbytes,
        sha256_before=digest_of(base, entry), sha256_after=None,
    )  # fmt: skip


def _new_settings(folder: Path, settings: Any, field: str, count: int) -> dict[str, Any]:
    """config.json with the new number of experts under the name of the field and all of its aliases."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings.get_text_config()
    place = _place_of(text, settings, raw)
    assert place is not None, "the language model's settings are the whole's, or a part of them"
    aliases = [name for name, meant in text.attribute_map.items() if meant == field]
    names = [name for name in (field, *aliases) if name in place]
    for name in names or [field]:
        place[name] = count
    return raw


def _place_of(text: Any, settings: Any, raw: dict[str, Any]) -> dict[str, Any] | None:
    """Where config.json has the language model's settings: at its top, in a part, or in a part's part (qwen3_omni)."""
    if settings is text:
        return raw
    for name in type(settings).sub_configs:
        part = getattr(settings, name, None)
        if part is not None:
            inner = raw.get(name, {})
            found = _place_of(text, part, inner)
            if found is not None:
                raw[name] = inner  # where config.json left the part at its defaults
                return found
    return None


@torch.inference_mode()
def check_runs(source: ModelSource, folder: Path) -> None:
    """Loads what was written to a folder, one layer at a time, and runs a few tokens through all layers; `ModelError`
    if it does not load, or computes anything that is not finite."""
    written = dataclasses.replace(source, folder=folder)
    kept: Kept = {}
    try:
        with Checkpoint(folder, source.field) as checkpoint:
            empty = empty_model(written, device="cpu")
            streamed = StreamedModel(empty, checkpoint, torch.device("cpu"))
            path = next(iter(streamed.banks.values())).path
            ids_BL = torch.arange(PROBE)[None] % text_config(empty).vocab_size
            with (
                tapped(empty, lambda _: None, streamed.experts),
                layer_by_layer(empty, path) as run,
                streamed.running(range(num_layers(empty)), all_wanted=False) as loaded,
            ):
                for layer in loaded:
                    kept = run(layer, kept, input_ids=ids_BL, use_cache=False)
        if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
            raise ModelError("its hidden states are not finite", field=source.field)
    except (ModelError, RuntimeError, ValueError, IndexError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"without these experts the checkpoint does not load and run ({why}); use ",
            Field("mode"),
            " zero",
            field=source.field,
        ) from error
