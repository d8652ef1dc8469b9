"""How far an adapter moves the weights that it is on: |scaling B A| / |W|, Frobenius norms, for each expert.

|B A|^2 is the trace of (B^T B)(A A^T), so no matrix of the weights' size is formed. The base is read one piece at a
time. A merged checkpoint in half precision rounds these changes; `compare` measures what remains of them there.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from superexperts.adapters.factors import Factor, read_factors
from superexperts.adapters.fitting import stored_by
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import ModelError
from superexperts.core.types import ExpertKey, key_order
from superexperts.models.experts import DOWN, up_name
from superexperts.models.loading import load_structure
from superexperts.models.parts import ModelParts

__all__ = ["Changes", "adapter_changes", "change_norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """The relative norms of one adapter's changes."""

    experts: Mapping[ExpertKey, float]
    """For each adapted expert, the norm of all its changes over the norm of all its matrices, adapted or not."""
    others: Mapping[int, float]
    """For everything else that is adapted, such as attention: per layer, the changes over the matrices they change."""


def change_norm(factor: Factor) -> float:
    """The Frobenius norm of scaling * B A, without forming it."""
    a_RI, b_OR = factor.a_RI.double(), factor.b_OR.double()
    squared = float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())  # both are symmetric: the trace of their product
    return abs(factor.scaling) * math.sqrt(max(squared, 0.0))


def adapter_changes(source: ModelSource, adapters: Mapping[str, Path]) -> dict[str, Changes]:
    """The changes that each adapter folder makes to a base model, by the adapter's name.

    `ModelError` if the model is quantized, or keeps its experts in another order than the model class; `DataError` for
    an adapter that is more than A and B.
    """
    with Checkpoint(source.folder, source.field) as checkpoint:
        structure = load_structure(source)
        model_parts = ModelParts(structure, checkpoint)
        if model_parts.key_mapping.quantized:
            raise ModelError(
                f"{source.name!r} is quantized, so its weights have no norm to compare with", field=source.field
            )
        norms = _Norms(checkpoint)
        with warnings.catch_warnings():  # PEFT warns because the adapter names its base model, not the folder of it
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
            return {name: _changes(model_parts, adapter, norms) for name, adapter in adapters.items()}


class _Norms:
    """Squared norms of the base's tensors, each read once however many adapters change it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.known: dict[tuple[str, int], float] = {}

    def __call__(self, entries: Iterable[Entry]) -> float:
        found = 0.0
        for entry in entries:
            place = (entry.key, entry.offset)
            if place not in self.known:
                weights = self.checkpoint.read(entry)
                self.known[place] = float(torch.linalg.vector_norm(weights, dtype=torch.float64)) ** 2
            found += self.known[place]
        return found


def _changes(model_parts: ModelParts, adapter: Path, norms: _Norms) -> Changes:
    banks = {bank.path: bank for bank in model_parts.banks}
    moved: dict[ExpertKey, float] = collections.defaultdict(float)
    bases: dict[ExpertKey, float] = collections.defaultdict(float)
    moved_by_layer: dict[int, float] = collections.defaultdict(float)
    bases_by_layer: dict[int, float] = collections.defaultdict(float)
    stored = stored_by(model_parts.model, model_parts.key_mapping)
    for place, factor in read_factors(model_parts.model, adapter, "folder", stored).items():
        squared = change_norm(factor) ** 2
        if place.expert is not None:
            bank = banks[place.path]
            key: ExpertKey = (bank.layer, place.expert)
            if key not in moved:
                for name in (up_name(bank.module), DOWN):
                    parts = model_parts.parts.get(f"{bank.path}.{name}")
                    if parts is None:
                        raise ModelError(
                            f"its checkpoint keeps the experts of {bank.path} in another order",
                            field=model_parts.checkpoint.field,
                        )
                    bases[key] += norms(parts[place.expert])
            moved[key] += squared
            continue
        entry = model_parts.key_mapping.whole(f"{place.path}.weight")
        layer = None if entry is None else model_parts.layer_of(entry.key)
        if entry is None or layer is None:
            continue  # outside the decoder's layers, or stored in another form: there is no norm to compare with
        if model_parts.expert_of.get(entry.key) == "shared":
            moved[layer, "shared"] += squared
            bases[layer, "shared"] += norms((entry,))
        else:
            moved_by_layer[layer] += squared
            bases_by_layer[layer] += norms((entry,))
    return Changes(
        experts={key: _ratio(moved[key], bases[key]) for key in sorted(moved, key=key_order)},
        others={layer: _ratio(moved_by_layer[layer], bases_by_layer[layer]) for layer in sorted(moved_by_layer)},
    )


def _ratio(moved: float, base: float) -> float:
    return math.sqrt(moved / base) if base else math.inf
