"""Finds the down_proj of every expert in an ordinary checkpoint from the headers of its shards and config.json alone.

No model is built and transformers is not imported: that import takes longer than everything else that `prune` does. For
a checkpoint that is not clearly ordinary the answer is None, and `locate.py` asks the structure of the model. In an
ordinary checkpoint all layers agree: experts are numbered from 0, each has three matrices, exactly one of which has the
hidden size as its output, and no layer or setting contradicts another. The code knows no family and no matrix by name.

Shapes: E experts of a layer, D hidden size, F intermediate size of an expert or a dense layer, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.core.types import ExpertKey

__all__ = ["DownProjection", "down_projections", "locate_by_shape"]

NUMBERED = re.compile(r"(.+?)\.(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)
"""A key inside a numbered list of modules: the list, the number, the rest."""
ATTRIBUTE = re.compile(r"self\.(\w+)\s*[:=][^=]|(?<=register_buffer\(\")\w+|(?<=register_parameter\(\")\w+")
"""What the source of a module declares as its parts."""
SIZES = {"num", "n", "size", "dim", "rank", "heads"}
"""A setting with one of these words in its name must be a whole number or null."""

Tensors = Mapping[str, Entry]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownProjection:
    """Where a checkpoint holds the down_proj of one expert."""

    expert: ExpertKey
    weight: Entry
    bias: Entry | None = None
    """None in families without one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer of the decoder. Names in it are the part of a key after the layer's number."""

    bank: str | None
    """Name of the list of experts; None in a dense layer."""
    experts: Mapping[int, Tensors]
    rest: Shapes
    """Shapes of everything that belongs to no expert."""


def locate_by_shape(checkpoint: Checkpoint, experts: Sequence[ExpertKey]) -> list[DownProjection] | None:
    """The down_proj of each expert; None if the checkpoint is not ordinary or an expert is not a routed one."""
    settings = _read(checkpoint.folder / "config.json")
    if not _are_known(checkpoint, settings):
        return None
    found = down_projections(checkpoint, settings)
    if found is None or not found.keys() >= set(experts):
        return None
    return [DownProjection(expert=expert, weight=found[expert]) for expert in experts]


def down_projections(entries: Tensors, settings: Any) -> dict[ExpertKey, Entry] | None:
    """The down_proj of every routed expert, given the tensors and what config.json holds; None if anything is odd."""
    if not _are_plain(settings):
        return None
    ends, lists = _by_list(entries)
    if len(lists) != 1:
        return None
    ((decoder, numbered),) = lists.items()
    layers = [_layer(numbered[number]) for number in sorted(numbered)]
    sparse = [layer for layer in layers if layer is not None and layer.bank is not None]
    dense = [layer for layer in layers if layer is not None and layer.bank is None]
    if not (
        sparse
        and len(sparse) + len(dense) == settings["num_hidden_layers"]
        and _are_counted(numbered)
        and _are_outer_tensors(ends, decoder.rpartition(".")[0], settings)
    ):
        return None
    down = _name_of_down(sparse, dense, settings)
    if down is None:
        return None
    return {
        (number, expert): tensors[down]
        for number, layer in enumerate(layers)
        if layer is not None
        for expert, tensors in layer.experts.items()
    }


# ---- config.json ----


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # the slower way reports what is wrong with it


def _are_known(keys: Iterable[str], settings: Any) -> bool:
    """Whether the installed transformers has a language model of the family with exchangeable experts, and every word
    of the keys occurs in that model or in transformers' list of older names.

    The second part makes sure that keys of something else are not overlooked. The source files of transformers are read
    for this, and not run."""
    family = settings.get("model_type") if isinstance(settings, dict) else None
    package = importlib.util.find_spec("transformers")
    if not isinstance(family, str) or not re.fullmatch(r"[a-z0-9_]+", family) or package is None:
        return False
    library = Path(str(package.origin)).parent
    try:
        model = (library / "models" / family / f"modeling_{family}.py").read_text(encoding="utf-8")
        conversions = (library / "conversion_mapping.py").read_text(encoding="utf-8")
    except OSError:
        return False
    if "@use_experts_implementation" not in model or "ForCausalLM(" not in model:
        return False
    words = {word for key in keys for word in key.split(".") if not word.isdigit()}
    return words <= {"weight", "bias"} | set(ATTRIBUTE.findall(model)) | set(re.findall(r"\w+", conversions))


def _are_plain(settings: Any) -> bool:
    """Whether the settings are of a text model, not quantized, and all sizes in them are whole numbers."""
    if not isinstance(settings, dict):
        return False
    for name, value in settings.items():
        words = set(name.split("_"))
        if words & {"quantization", "compression"} and value is not None:
            return False
        if words & SIZES and value is not None and not (type(value) is int and value >= 0):
            return False
        if isinstance(value, dict) and "hidden_size" in value:
            return False
    return all(type(settings.get(name)) is int for name in ("hidden_size", "num_hidden_layers", "vocab_size"))


def _numbers(settings: Mapping[str, Any], word: str) -> set[int]:
    """The whole numbers in the settings under a name that contains `word`."""
    return {value for name, value in settings.items() if word in name and type(value) is int}


# ---- keys ----


def _by_list(entries: Tensors) -> tuple[dict[str, Entry], dict[str, dict[int, dict[str, Entry]]]]:
    """Splits tensors into those in no numbered list, and those of each list by their number."""
    rest: dict[str, Entry] = {}
    lists: dict[str, dict[int, dict[str, Entry]]] = {}
    for key, entry in entries.items():
        place = NUMBERED.fullmatch(key)
        if place is None:
            rest[key] = entry
        else:
            lists.setdefault(place[1], {}).setdefault(int(place[2]), {})[place[3]] = entry
    return rest, lists


def _layer(tensors: Tensors) -> _Layer | None:
    """One layer; None if it holds several lists, or a list outside any module."""
    rest, lists = _by_list(tensors)
    bank = next(iter(lists), None)
    if len(lists) > 1 or (bank is not None and "." not in bank):
        return None
    return _Layer(bank=bank, experts={} if bank is None else lists[bank], rest=_shapes(rest))


def _shapes(tensors: Tensors) -> Shapes:
    return {name: entry.shape for name, entry in tensors.items()}


def _are_counted(numbers: Mapping[int, Any]) -> bool:
    return numbers.keys() == set(range(len(numbers)))


def _are_outer_tensors(ends: Tensors, stem: str, settings: Mapping[str, Any]) -> bool:
    """Whether the tensors outside the layers are an embedding, a final norm and, unless it is tied, a head."""
    embedding, norm = (settings["vocab_size"], settings["hidden_size"]), (settings["hidden_size"],)
    modules: dict[str, list[tuple[int, ...]]] = {}
    for key, entry in ends.items():
        modules.setdefault(key.rpartition(".")[0], []).append(entry.shape)
    beside = [sorted(shapes) for path, shapes in modules.items() if path.startswith(f"{stem}.")]
    elsewhere = [sorted(shapes) for path, shapes in modules.items() if not path.startswith(f"{stem}.")]
    norms = [shapes for shapes in beside if shapes in ([norm], [norm, norm])]  # some have a bias, as some heads do
    if len(beside) != 2 or [embedding] not in beside or len(norms) != 1:
        return False
    if not elsewhere:
        return settings.get("tie_word_embeddings") is True
    return elsewhere in ([[embedding]], [[embedding[:1], embedding]])


def _name_of_down(sparse: Sequence[_Layer], dense: Sequence[_Layer], settings: Mapping[str, Any]) -> str | None:
    """Name of the down_proj of an expert.

    None unless all layers with experts are alike, all dense layers are alike, and the two kinds differ only in the
    block that holds the experts."""
    first, experts, count = sparse[0], sparse[0].experts, len(sparse[0].experts)
    sample = experts.get(0, {})
    kinds = {entry.kind for entry in sample.values()}
    if len(kinds) != 1 or not kinds <= {"BF16", "F16", "F32"} or not _are_counted(experts):
        return None
    for layer in sparse:
        if (layer.bank, layer.rest, layer.experts.keys()) != (first.bank, first.rest, experts.keys()):
            return None
        for tensors in layer.experts.values():
            if _shapes(tensors) != _shapes(sample) or {entry.kind for entry in tensors.values()} != kinds:
                return None
    inside, outside = _parted(first.rest, str(first.bank))
    if (count, settings["hidden_size"]) not in inside.values() or count not in _numbers(settings, "expert"):
        return None  # no router, or one for another number of experts
    down = _down_of(_shapes(sample), settings)
    for layer in dense:
        mlp, others = _parted(layer.rest, str(first.bank))
        if others != outside or layer.rest != dense[0].rest or mlp.keys() != sample.keys():
            return None
        if _down_of(mlp, settings) != down:
            return None
    return down


def _parted(shapes: Shapes, bank: str) -> tuple[Shapes, Shapes]:
    """Shapes inside the block that holds the list of experts (by their names in it), and shapes outside it."""
    block = bank.rpartition(".")[0] + "."
    inside = {name.removeprefix(block): shape for name, shape in shapes.items() if name.startswith(block)}
    return inside, {name: shape for name, shape in shapes.items() if not name.startswith(block)}


def _down_of(matrices: Shapes, settings: Mapping[str, Any]) -> str | None:
    """The one matrix [D, F] beside two [F, D].

    With only one beside it, a transposed pair would have the same shapes, so shapes could not distinguish the two."""
    hidden, widths = settings["hidden_size"], _numbers(settings, "intermediate")
    found = [name for name, shape in matrices.items() if shape[:1] == (hidden,)]
    if len(matrices) != 3 or len(found) != 1:
        return None
    down = matrices[found[0]]
    others = {shape for name, shape in matrices.items() if name != found[0]}
    return found[0] if len(down) == 2 and others == {down[::-1]} and down[1] in widths else None
