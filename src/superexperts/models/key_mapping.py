"""Which tensors of a checkpoint make which parameter of a model, by transformers' own rules for loading.

No weight is read, and the model may be on the meta device.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from superexperts.checkpoints.float8 import is_quantized
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.core.errors import ModelError
from superexperts.models.banks import Bank

__all__ = ["BLOCKS", "SCALES", "KeyMapping", "Parts"]

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two tensors that MXFP4 (the format of gpt_oss) stores for each parameter of a bank: 4-bit numbers, two
to a byte, and a power of two for every 32 of them. The first dimension of both counts experts. Zero blocks decode to 0
under any scale, so an expert can be zeroed without touching its scales (transformers, integrations/mxfp4.py)."""

Parts = tuple[Entry, ...]
"""What an expert's matrix is made of in the checkpoint: one piece, or several below each other."""


class KeyMapping:
    """Which keys of a checkpoint make which parameters and buffers of a model.

    `ModelError` if the checkpoint has a key that the model has no place for. Quantized checkpoints are exempt, because
    some of their keys are the scales of others.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.quantized = is_quantized(cast(Any, model).config)
        self.checkpoint = checkpoint
        self.conversions = get_model_conversion_mapping(cast(Any, model))
        self.sources: dict[str, list[tuple[str | None, str]]] = collections.defaultdict(list)
        """Per name in the model (the first of those that a conversion makes) the keys that it comes from, each with
        the pattern of the conversion that takes it (None where it is taken as it is)."""
        self._tied: dict[str, str] = cast(Any, model).all_tied_weights_keys
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.ignored = self._find(model)
        """Keys that the family's model does without, such as layers for speculative decoding, as the model would name
        them."""

    def _find(self, model: nn.Module) -> tuple[str, ...]:
        """As `convert_and_load_state_dict_in_model` of transformers finds them."""
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        state, prefix = model.state_dict(), cast(Any, model).base_model_prefix
        unplaced: set[str] = set()
        packed: list[tuple[str, str]] = []
        for key in sorted(self.checkpoint, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            # A renaming for an older layout can hit a key that is already right; the key itself is then the
            # parameter's name.
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name in state:
                self.sources[name].append((pattern, key))
            elif self.quantized and self._is_packed(name, self.checkpoint[key]):
                packed.append((name, key))
            else:
                unplaced.add(name)
        for name, key in packed:
            self.sources[name].append((None, key))
            self._shapes[name] = torch.Size(self.checkpoint[key].shape)
        info = _info(unexpected=unplaced)
        cast(Any, model)._adjust_missing_and_unexpected_keys(info)
        if info.unexpected_keys and not self.quantized:
            some = ", ".join(map(ascii, sorted(info.unexpected_keys)[:3]))
            raise ModelError(
                f"the checkpoint has {len(info.unexpected_keys)} unexpected keys ({some}); repair it",
                field=self.checkpoint.field,
            )
        return tuple(sorted(unplaced))

    def _is_packed(self, name: str, entry: Entry) -> bool:
        for ending in (BLOCKS, SCALES):
            shape = tuple(self._shapes.get(name.removesuffix(ending), ())) if name.endswith(ending) else ()
            if len(shape) == 3 and len(entry.shape) > 1 and entry.shape[0] == shape[0] and entry.dtype == torch.uint8:
                return True
        return False

    def check_complete(self, model: nn.Module) -> None:
        """`ModelError` for a checkpoint that lacks a parameter or an expert's matrix, which would be random."""
        self._check_stacks()
        several = any(
            len(entry.target_patterns) > 1 for entry in self.conversions if isinstance(entry, WeightConverter)
        )
        if several:
            return  # `sources` has only the first of several names
        tied = cast(Any, model).all_tied_weights_keys
        known = {*self.sources, *tied, *(name.removesuffix(BLOCKS) for name in self.sources)}
        info = _info(missing={name for name in model.state_dict() if name not in known})
        cast(Any, model)._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys and self.quantized:
            raise ModelError(
                f"is quantized in a layout that cannot be edited (it has no {min(info.missing_keys)}); use its "
                "bfloat16 form",
                field=self.checkpoint.field,
            )
        if info.missing_keys:
            raise ModelError(f"the checkpoint has no {min(info.missing_keys)}; repair it", field=self.checkpoint.field)

    def _check_stacks(self) -> None:
        """`ModelError` where a conversion stacks fewer matrices than the model has experts."""
        stacks = [
            entry for entry in self.conversions
            if isinstance(entry, WeightConverter) and type(entry.operations[0]) is MergeModulelist
        ]  # fmt: skip
        for name, sources in self.sources.items():
            patterns = {pattern for pattern, _ in sources}
            for converter in stacks:
                if not patterns <= set(converter.source_patterns) or len(converter.target_patterns) > 1:
                    continue
                for expected in converter.source_patterns:
                    keys = [key for pattern, key in sources if pattern == expected]
                    if len(keys) != self._shapes[name][0]:
                        raise ModelError(
                            f"the checkpoint has {len(keys)} of {self._shapes[name][0]} tensors {expected} of {name}; "
                            "repair it",
                            field=self.checkpoint.field,
                        )

    def whole(self, name: str) -> Entry | None:
        """The one entry that holds this parameter or buffer unchanged; None if it is made of several, or absent."""
        name = self.stored_as(name)
        sources = self.sources.get(name, [])
        if len(sources) != 1 or sources[0][0] is not None:
            return None
        entry = self.checkpoint[sources[0][1]]
        return entry if entry.shape == self._shapes[name] else None

    def stored_as(self, name: str) -> str:
        """The name under which the checkpoint keeps a parameter: another one where two are tied."""
        return self._tied.get(name, name) if name not in self.sources else name

    def expert_rows(self, bank: Bank, name: str) -> list[Parts] | None:
        """As `expert_parts`, whatever the order of the numbers within an expert's part: for zeros, and to compare."""
        parts = self.expert_parts(bank, name)
        if parts is not None:
            return parts
        entry = self.experts_first(f"{bank.path}.{name}")
        if entry is None or len(entry.shape) != 3 or entry.shape[0] != bank.num_experts:
            return None
        return [(entry.row(expert),) for expert in range(bank.num_experts)]

    def experts_first(self, name: str) -> Entry | None:
        """The one entry that a parameter is made from without a change of its first dimension; None if there is
        none."""
        whole = self.whole(name)
        sources = self.sources.get(self.stored_as(name), [])
        if whole is not None or len(sources) != 1:
            return whole
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        own = [entry for entry in converters if entry.source_patterns == [sources[0][0]]]
        kept = bool(own) and all(map(_keeps_experts, own[0].operations))
        return self.checkpoint[sources[0][1]] if kept else None

    def expert_parts(self, bank: Bank, name: str) -> list[Parts] | None:
        """Per expert of the bank the pieces of its part of a parameter; None where the checkpoint keeps them in
        another order, which only transformers' conversion of the whole bank undoes."""
        whole = self.whole(f"{bank.path}.{name}")
        if whole is not None:
            return [(whole.row(expert),) for expert in range(whole.shape[0])]
        columns = self.stacked(f"{bank.path}.{name}")
        if columns is None:
            return None
        shape = cast(Tensor, getattr(bank.module, name)).shape
        if any(len(column) != shape[0] for column in columns):
            return None
        parts = list(zip(*columns, strict=True))
        rows = {sum(entry.shape[0] for entry in pieces) for pieces in parts}
        fits = rows == {shape[1]} and {entry.shape[1:] for pieces in parts for entry in pieces} == {shape[2:]}
        return parts if fits else None

    def stacked(self, name: str) -> list[list[Entry]] | None:
        """The entries that a conversion stacks to this parameter, expert by expert: a list for the gate and one for
        the up projection, or a single one; None where it does anything else."""
        sources = self.sources.get(self.stored_as(name), [])
        patterns = {pattern for pattern, _ in sources}
        for converter in self.conversions:
            if isinstance(converter, WeightConverter) and patterns == set(converter.source_patterns):
                if not _stacks_experts(converter):
                    return None
                return [
                    [self.checkpoint[key] for pattern, key in sources if pattern == source]
                    for source in converter.source_patterns
                ]
        return None


def _info(missing: Collection[str] = (), unexpected: Collection[str] = ()) -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(missing), unexpected_keys=set(unexpected), mismatched_keys=set(), conversion_errors={},
        error_msgs=[], skipped_pp_keys=set(),
    )  # fmt: skip


def _keeps_experts(operation: Any) -> bool:
    """Whether an operation leaves the first dimension, that of the experts, as it is."""
    if type(operation) is Transpose:
        return 0 not in (operation.dim0, operation.dim1)
    return type(operation) is Interleave and operation.dim != 0


def _stacks_experts(converter: WeightConverter) -> bool:
    """Whether a conversion only stacks experts, and their gate on top of their up projection."""
    stack, *join = converter.operations
    if not (type(stack) is MergeModulelist and stack.dim == 0 and len(converter.target_patterns) == 1):
        return False
    if not join:
        return len(converter.source_patterns) == 1
    return len(join) == 1 and type(join[0]) is Concatenate and join[0].dim == 1
