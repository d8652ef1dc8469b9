"""What a study compares: variants, each a way to change the model, and their runs, one per seed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = ["DEFAULT_SETS", "DEFAULT_VARIANTS", "SETS", "Kind", "Run", "title_of"]

Kind = Literal["base", "prune", "lora"]

SETS = {
    "super": "super experts",
    "random": "random experts",
    "anywhere": "random experts of any layer",
    "routed": "most routed experts",
    "gate": "experts of highest gate weight",
    "reap": "experts of highest saliency",
    "layers": "all experts of the layers",
}
"""Sets of experts that every study has, and their titles."""
DEFAULT_SETS: dict[str, dict[str, Any]] = {
    "super": {"rule": "super"},
    "random": {"rule": "random", "like": "super"},
    "anywhere": {"rule": "random", "like": "super", "anywhere": True},
    "routed": {"rule": "routed", "like": "super"},
    "gate": {"rule": "gate", "like": "super"},
    "reap": {"rule": "reap", "like": "super"},
    "layers": {"rule": "layers", "like": "super"},
}
"""Settings of `select` for each set; `like` names another set."""
DEFAULT_VARIANTS = ("base", "prune-super", "prune-random", "lora-super", "lora-random", "lora-attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One model to evaluate: a variant with one seed."""

    name: str
    """Folder below `variants/`: the variant's name, with `-s1`, `-s2` for the second and third run."""
    variant: str
    """base, prune-SET, lora-SET or lora-attention."""
    kind: Kind
    target: str | None
    """The set of experts, or "attention"; None for the base model."""
    seed: int
    """Seed of the draw of random experts, of the adapter's initial values, and of the order of the training rows."""
    experts: str | None
    """Stem of its file in `experts/`; None for base and attention."""
    drawn: bool
    """Whether another seed draws other experts."""

    @property
    def random(self) -> bool:
        """Whether another seed would give another model."""
        return self.drawn or self.kind == "lora"


def title_of(kind: Kind, target: str | None) -> str:
    """The title of a variant in tables, such as `prune super experts`."""
    if kind == "base" or target is None:
        return "baseline"
    what = "attention" if target == "attention" else SETS.get(target, f"set '{target}'")
    return f"prune {what}" if kind == "prune" else f"LoRA on {what}"
