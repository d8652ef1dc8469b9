"""The commands about adapters as files: export, import and push; `config.py` has the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from superexperts.core.settings import (
    Switch,
)

__all__ = ["ExportConfig", "ImportConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter that `train` made as other programs load it.

    Example: superexperts export runs/lora --format peft --out runs/lora-peft
    """

    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """Adapter folder, or the folder of `train` that holds it."""
    format: Literal["merged", "peft", "vllm"]
    """`merged`: a checkpoint with the adapter inside; `peft`: PEFT's fused layout, loaded by PEFT alone; `vllm`: one
    key for each expert, as serving engines read them."""
    out: Path = Path("runs/export")
    """Folder to write."""
    model: str | None = None
    """The adapter's base model; default: the one that its adapter_config.json names."""
    copy: Switch = False
    """merged: copy the shards without a change, which otherwise are hard links (symbolic ones into the Hub's cache)."""
    revision: str | None = None
    """Branch, tag or commit of it on the Hub; default: the adapter's."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    json: Switch = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Read LoRA on experts as other programs write it, and say which layout it was.

    Example: superexperts import runs/lora-peft pocket --out runs/imported
    """

    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """The adapter's base model: checkpoint folder, Hub name, or `pocket`."""
    out: Path = Path("runs/imported")
    """Folder for adapter/."""
    layout: Literal["auto", "peft-0.18", "peft-0.19", "per-expert", "unsloth", "unsloth-peft-0.18"] = "auto"
    """How the file is to be read; `auto` finds out, and asks where the file does not tell."""
    revision: str | None = None
    """Branch, tag or commit of MODEL on the Hub."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    json: Switch = False
    """Print the result as JSON."""
