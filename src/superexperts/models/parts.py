"""Which layer and expert every part of a checkpoint belongs to, and its parts paired with another checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.core.types import ExpertId
from superexperts.models.banks import Bank, find_banks
from superexperts.models.decoder import in_layer
from superexperts.models.experts import DOWN
from superexperts.models.key_mapping import BLOCKS, SCALES, KeyMapping

__all__ = ["ModelParts", "Unit", "pair_units"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A tensor, or the part of a tensor that belongs to one expert, in two checkpoints A and B."""

    key: str
    """Key in A, or in B if A has none; `key[3]` is expert 3 of a fused tensor."""
    layer: int | None = None
    """Number of the decoder layer, None outside of the layers."""
    expert: ExpertId | None = None
    """None for weights that belong to no expert, or to all of a layer."""
    a: tuple[Entry, ...] = ()
    """The pieces in A, in order; empty if A lacks it. `b` likewise."""
    b: tuple[Entry, ...] = ()


class ModelParts:
    """A checkpoint as its model sees it: every key's parameter, and every expert's own parts."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.banks = find_banks(model, checkpoint.field)
        self.key_mapping = KeyMapping(model, checkpoint)
        self.names = {key: name for name, sources in self.key_mapping.sources.items() for _, key in sources}
        """Key -> name in the model."""
        self._layer = in_layer(self.banks[0].path, self.banks[0].layer)
        paths = {module: path for path, module in model.named_modules()}
        self._shared = {
            _mlp_of(paths[bank.shared_down], bank.path): bank.layer
            for bank in self.banks
            if bank.shared_down is not None
        }
        self.parts: dict[str, list[tuple[Entry, ...]]] = {}
        """Per parameter of a bank the pieces of each expert."""
        self._layer_of_part: dict[str, int] = {}
        self.expert_of: dict[str, ExpertId] = {}
        """Of the keys that hold one expert's weights alone."""
        for bank in self.banks:
            for parameter, _ in bank.module.named_parameters(recurse=False):
                for name in (parameter, f"{parameter}{BLOCKS}", f"{parameter}{SCALES}"):
                    self._add(bank, name)
        for key, name in self.names.items():
            if any(name.startswith(f"{path}.") for path in self._shared):
                self.expert_of[key] = "shared"

    def _add(self, bank: Bank, parameter: str) -> None:
        parts = self.key_mapping.expert_rows(bank, parameter)
        if parts is None:
            return
        name = self.key_mapping.stored_as(f"{bank.path}.{parameter}")
        self.parts[name], self._layer_of_part[name] = parts, bank.layer
        for expert, pieces in enumerate(parts):
            for entry in pieces:
                if self.checkpoint[entry.key] == entry:  # not a row of a fused tensor
                    self.expert_of[entry.key] = expert

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer, the most that one has."""
        return max(bank.num_experts for bank in self.banks)

    def is_fused(self, name: str) -> bool:
        """Whether a parameter's experts are rows of one tensor."""
        return any(self.checkpoint[entry.key] != entry for pieces in self.parts.get(name, []) for entry in pieces)

    @property
    def unknown(self) -> Bank | None:
        """A bank of which the checkpoint does not keep the experts apart; None if there is none."""
        known = set(self.parts)
        for bank in self.banks:
            name = self.key_mapping.stored_as(f"{bank.path}.{DOWN}")
            if not {name, f"{bank.path}.{DOWN}{BLOCKS}"} & known:
                return bank
        return None

    def layer_of(self, key: str) -> int | None:
        """The decoder layer that a key belongs to."""
        name = self.names.get(key, key)
        if name in self._layer_of_part:
            return self._layer_of_part[name]
        found = self._layer.match(name)
        return int(found[1]) if found else None


def _mlp_of(down: str, bank: str) -> str:
    """Path of the shared expert that a path leads into: the first part that is none of the bank's own path."""
    parts = down.split(".")
    depth = next(i for i, (own, other) in enumerate(zip(parts, bank.split("."), strict=False)) if own != other)
    return ".".join(parts[: depth + 1])


def pair_units(a: ModelParts | Checkpoint, b: ModelParts | Checkpoint) -> list[Unit]:
    """Everything that either checkpoint holds, each thing once, in A's order, then B's.

    Keys are paired by name. A fused tensor is taken apart into its experts; where one checkpoint is fused and the other
    is not, or calls a parameter otherwise, they are paired through the model.
    """
    if isinstance(a, ModelParts) and isinstance(b, ModelParts):
        return list(_units(a, b))
    one, other = (side.checkpoint if isinstance(side, ModelParts) else side for side in (a, b))
    units = [Unit(key=key, a=(entry,), b=_maybe(other.get(key))) for key, entry in one.items()]
    return units + [Unit(key=key, b=(entry,)) for key, entry in other.items() if key not in one]


def _maybe(entry: Entry | None) -> tuple[Entry, ...]:
    return () if entry is None else (entry,)


def _units(a: ModelParts, b: ModelParts) -> Iterator[Unit]:
    done_a: set[str] = set()
    done_b: set[str] = set()
    for name in [
        *a.key_mapping.sources,
        *(name for name in b.key_mapping.sources if name not in a.key_mapping.sources),
    ]:
        keys_a, keys_b = ([key for _, key in side.key_mapping.sources.get(name, [])] for side in (a, b))
        fused = any(side.is_fused(name) for side in (a, b))
        # Experts are paired one by one where a side fuses them or the keys differ; equal keys are cheaper to pair as
        # they are.
        alike = len(a.parts.get(name, ())) == len(b.parts.get(name, ())) > 0
        if alike and (fused or keys_a != keys_b):
            some = keys_a[0] if len(keys_a) == 1 else name
            for expert, (pieces_a, pieces_b) in enumerate(zip(a.parts[name], b.parts[name], strict=True)):
                yield Unit(key=f"{some}[{expert}]", layer=a.layer_of(keys_a[0]), expert=expert, a=pieces_a, b=pieces_b)
            done_a |= set(keys_a)
            done_b |= set(keys_b)
        elif len(keys_a) == len(keys_b) == 1 and keys_a != keys_b:
            whole_a, whole_b = a.key_mapping.whole(name), b.key_mapping.whole(name)
            if whole_a is not None and whole_b is not None:
                yield Unit(
                    key=keys_a[0], layer=a.layer_of(keys_a[0]), expert=a.expert_of.get(keys_a[0]),
                    a=(whole_a,), b=(whole_b,),
                )  # fmt: skip
                done_a |= set(keys_a)
                done_b |= set(keys_b)
    for key, entry in a.checkpoint.items():
        if key not in done_a:
            other = b.checkpoint.get(key) if key not in done_b else None
            yield Unit(
                key=key, layer=a.layer_of(key), expert=a.expert_of.get(key), a=(entry,), b=_maybe(other)
            )  # fmt: skip
    for key, entry in b.checkpoint.items():
        if key not in done_b and key not in a.checkpoint:
            yield Unit(key=key, layer=b.layer_of(key), expert=b.expert_of.get(key), b=(entry,))
