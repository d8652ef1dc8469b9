"""The names of a checkpoint's tensors, read from its safetensors files without the tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import ModelError

__all__ = ["stored_names"]


def stored_names(folder: Path) -> set[str]:
    """The name of every tensor in a checkpoint folder."""
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                names.update(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"MODEL: {file} cannot be read ({error}); fetch the checkpoint again") from error
    return names
