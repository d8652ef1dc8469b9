"""The settings that decide whether a result on disk is up to date."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["identity"]

# Settings that say where a result goes, how it is shown, or where its inputs are: moving a file must not make a result
# old, so the files' digests (`contents`) count instead.
NOT_IDENTITY = (
    *("out", "overwrite", "json", "model", "experts", "data", "data_dir", "adapter", "silence", "profile", "like"),
    *("base_url", "concurrency", "timeout", "retries"),
    *("recipe", "eval_data", "checkpoint_steps", "resume", "report_to"),
)


def identity(config: Any, **contents: Any) -> dict[str, Any]:
    """What a result depends on, for a manifest: `options`, the settings as text and without paths, and `contents`,
    the digests of the files at those paths."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    return {"options": {name: str(value) for name, value in options.items()}, **contents}
