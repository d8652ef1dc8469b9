"""Numbers for single experts, as text."""

from __future__ import annotations

import re

from superexperts.core.errors import OptionError
from superexperts.core.types import ExpertKey, ExpertSet

__all__ = ["values_by_expert"]


def values_by_expert(text: str, field: str) -> dict[ExpertKey, float]:
    """`L2E54=32,L8shared=8` -> {(2, 54): 32, (8, "shared"): 8}; `OptionError` about `field` for other text."""
    values: dict[ExpertKey, float] = {}
    for part in filter(str.strip, text.split(",")):
        found = re.fullmatch(r"(L\d+(?:E\d+|shared))=(\d+(?:\.\d+)?)", part.strip(), re.IGNORECASE)
        if found is None or not float(found[2]) or (field == "ranks" and "." in found[2]):
            raise OptionError(f"{part!r} is not like L2E54=32; write EXPERT=NUMBER, separated by commas", field=field)
        (expert,) = ExpertSet.parse(found[1]).experts
        if expert in values:
            raise OptionError(f"{found[1]} is named twice; give each expert one number", field=field)
        values[expert] = float(found[2]) if "." in found[2] else int(found[2])
    return values
