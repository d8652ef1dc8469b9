"""The commands about adapters as files: export, import and push; `config.py` has the others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from superexperts.core.settings import (
    Switch,
    require,
)

__all__ = ["ExportConfig", "ImportConfig", "PushConfig"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Put an adapter or a finished study on the Hub, with its card, in one commit. Logs in as `hf auth login` does, or
    with HF_TOKEN.

    Example: superexperts push runs/lora --repo OWNER/NAME --dry-run
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder of `train`, an adapter in it, or folder of `study`."""
    repo: str
    """OWNER/NAME on the Hub; made where it is missing. A model repository, or a data set's for a study without
    adapters."""
    private: bool = True
    """Whether a repository that is made is private. One that is there stays as it is; a public one needs
    --no-private."""
    revision: str | None = None
    """Branch, made where it is missing; default: main."""
    message: str | None = None
    """Of the commit; default: what was uploaded, and the version."""
    base_model: str | None = None
    """OWNER/NAME of the base model on the Hub; needed where the adapter was trained from a local folder."""
    license: str | None = None
    """For the card, as the Hub names it, such as apache-2.0; without it the card names none."""
    dataset: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """OWNER/NAME of training data on the Hub, for the card; may be given several times."""
    dry_run: Switch = False
    """Check everything and list the files with their sizes; nothing is sent."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        for option, names in (
            ("repo", [self.repo]),
            ("base_model", [self.base_model]),
            ("dataset", self.dataset),
        ):
            for name in names:
                good = name is None or re.fullmatch(r"[\w.-]+/[\w.-]+", name)
                require(bool(good), option, name, "is not OWNER/NAME; give it as the Hub shows it")
        for option, text in (("message", self.message), ("revision", self.revision), ("license", self.license)):
            require(text is None or bool(text.strip()), option, text, "is empty; leave it out, or give one")
