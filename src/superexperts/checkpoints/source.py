"""Which folder a model's or an adapter's name means. Neither torch nor transformers is imported for it."""

from __future__ import annotations

from pathlib import Path

from superexperts.core.errors import ModelError
from superexperts.pocket import checkpoint_dir

__all__ = ["CONFIG_FILE", "adapter_folder", "checkpoint_folder"]

# What a checkpoint is made of; .bin and .pt are pickles and are not fetched.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]

CONFIG_FILE = "adapter_config.json"
"""Makes a folder an adapter's."""


def checkpoint_folder(model: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The folder that `model` names: `pocket`, a folder, or a Hub repository's snapshot (fetched if need be and not
    forbidden)."""
    if model == "pocket":
        return checkpoint_dir()
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model!r} has no config.json; give a checkpoint folder", field="model")
        if not any(path.glob("*.safetensors")):
            raise ModelError(
                f"{model!r} has no .safetensors file (pickles are not read); convert it first", field="model"
            )
        return path
    # Here, so that a folder does not wait for the Hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=CHECKPOINT_FILES, local_files_only=not fetch)
        )
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            (
                f"{model!r} is neither a folder nor a model that the Hub gives ({type(error).__name__}); check "
                "the name and the network, or use `pocket`"
            ),
            field="model",
        ) from error


def adapter_folder(folder: Path) -> Path:
    """The folder itself, or its `adapter/` where it is one that `train` wrote."""
    inner = folder / "adapter"
    return folder if (folder / CONFIG_FILE).is_file() or not inner.is_dir() else inner
