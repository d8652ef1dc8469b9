"""Names of experts: (layer, expert) pairs and the text that people write for them."""

from __future__ import annotations

import re
from typing import Literal

from superexperts.core.errors import ExpertsError

__all__ = ["ExpertId", "ExpertKey", "expert_id", "key_name", "key_order", "read_keys"]

ExpertId = int | Literal["shared"]
ExpertKey = tuple[int, ExpertId]
"""(layer, expert): the 0-based number of the decoder layer, dense layers counted, and the expert's index in its bank,
or "shared" for the layer's shared expert(s)."""


def key_order(key: ExpertKey) -> tuple[int, int]:
    """Sorts experts by layer, routed ones by index, the shared one last."""
    layer, expert = key
    return layer, 2**31 if expert == "shared" else expert


def key_name(key: ExpertKey) -> str:
    """`(2, 54)` -> `L2E54`, `(8, "shared")` -> `L8shared`."""
    layer, expert = key
    return f"L{layer}shared" if expert == "shared" else f"L{layer}E{expert}"


def read_keys(text: str) -> list[ExpertKey]:
    """`L2E54,L3E38`, `2,54;3,38`, `L8shared` or `8,-1`; blanks and case do not matter.

    `ExpertsError` for other text.
    """
    named = re.split(r"[\s,;]+", text.strip("\n\t ,;"))
    numbered = re.sub(r"\s*([,;])\s*", r"\1", text.strip("\n\t ;"))
    if all(re.fullmatch(r"L\d+(E\d+|shared)", each, re.IGNORECASE) for each in named):
        found = [re.findall(r"\d+|shared", each.lower()) for each in named]
    elif re.fullmatch(r"\d+,-?\d+([;\s]+\d+,-?\d+)*", numbered):
        found = [pair.split(",") for pair in re.split(r"[;\s]+", numbered)]
    else:
        raise ExpertsError(f"{text!r} is neither a file nor like L2E54,L3E38; give one of the two", field="experts")
    return [(int(layer), expert_id(expert)) for layer, expert in found]


def expert_id(value: object) -> ExpertId:
    """54, "54" -> 54; -1, "-1", "shared", "shared_experts" -> "shared"."""
    if value in (-1, "-1", "shared", "shared_experts"):
        return "shared"
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).isdigit():
        return int(value)
    raise ExpertsError(f"{value!r} is not an expert; give an index, or 'shared'", field="experts")
