"""Which folder a model's or an adapter's name means. Neither torch nor transformers is imported for it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from superexperts.core.errors import ModelError
from superexperts.core.runs import fingerprint, read_json
from superexperts.pocket import checkpoint_dir

__all__ = ["CONFIG_FILE", "ModelSource", "adapter_folder", "resolve"]

# What a checkpoint is made of; .bin and .pt are pickles and are not fetched.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]

CONFIG_FILE = "adapter_config.json"
"""Makes a folder an adapter's."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: what a command resolves once, and everything below it is handed."""

    name: str
    """As the user gave it: `pocket`, a folder, or OWNER/NAME on the Hub."""
    folder: Path
    """The checkpoint on this machine."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the checkpoint may run."""
    field: str = "model"
    """The setting that named the model, for errors."""

    @functools.cached_property
    def config(self) -> Any:
        """The value in config.json, a dict unless the file is broken; read once."""
        return read_json(self.folder / "config.json", self.field)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint's files, see `core.runs.fingerprint`; read once."""
        return fingerprint(self.folder)


def resolve(
    name: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    fetch: bool = True,
    field: str = "model",
) -> ModelSource:
    """Finds the checkpoint that `name` means: `pocket`, a folder, or a Hub repository.

    A repository's snapshot is fetched unless it is here already; without `fetch` it must be here. `ModelError` about
    `field` if there is no such checkpoint, or if it holds no safetensors.
    """
    folder = checkpoint_dir() if name == "pocket" else Path(name)
    if name != "pocket" and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name!r} has no config.json; give a checkpoint folder", field=field)
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{name!r} has no .safetensors file (pickles are not read); convert it first", field=field)
    elif name != "pocket":
        folder = _snapshot(name, revision, fetch=fetch, field=field)
    return ModelSource(name, folder, revision, trust_remote_code, field)


def _snapshot(name: str, revision: str | None, *, fetch: bool, field: str) -> Path:
    # Imported here, so that a local folder does not wait for the Hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES, local_files_only=not fetch)
        )
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a model on the Hub ({type(error).__name__}); check the name and the "
            "network, or use `pocket`",
            field=field,
        ) from error


def adapter_folder(folder: Path) -> Path:
    """The folder itself; its `adapter/` where it is one that `train` wrote; or the only one below it that holds an
    adapter, since PEFT saves an adapter of another name than `default` in a folder of that name."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}"))
    return inside[0] if len(inside) == 1 else folder / "adapter" if (folder / "adapter").is_dir() else folder
