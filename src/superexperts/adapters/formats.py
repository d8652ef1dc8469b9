"""The layouts in which adapters are exported and imported. A new layout is one entry in `FORMATS`."""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import Any

__all__ = ["FORMATS", "Format", "readable", "writable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A layout of adapter files.

    Writer and reader are names, `module` or `module:object`, so that the choices of `--format` and `--layout` are known
    without importing torch.
    """

    title: str
    """What it is, for the help text."""
    writer: str | None = None
    """Offers `write(adapter, source, out, *, copy)` for `export`. It writes the adapter in the folder `adapter`, which
    belongs to the base model `source`, into the folder `out`, and returns numbers for the result, at least the `keys`
    written. `copy` forbids links to the base model's files."""
    reader: str | None = None
    """Offers two functions for `import`. `recognise(model, config, tensors, fields)` returns why a file is in this
    layout, or None if it is not. `read(model, config, tensors)` returns its factors (`factors.Factors`), and raises
    `DataError` unless it has used every tensor. `model` is without weights, `config` is PEFT's configuration, `tensors`
    are the file's, and `fields` is the content of adapter_config.json."""
    synced: bool = True
    """Whether `export` waits until the files are on disk; not for links and copies of whole checkpoints."""

    links: bool = False
    """Whether `copy` makes a difference: the writer links to files of the base model unless it is true."""

    def write(self) -> Any:
        """The function that writes the layout."""
        assert self.writer is not None
        return pkgutil.resolve_name(self.writer).write

    def load_reader(self) -> Any:
        """The object with `recognise` and `read`."""
        assert self.reader is not None
        return pkgutil.resolve_name(self.reader)


FORMATS = {
    "mlx-lm": Format(title="as mlx-lm writes it", reader="superexperts.adapters.mlx"),
    "merged": Format(
        title="a checkpoint with the adapter inside", writer="superexperts.adapters.merge", synced=False, links=True
    ),
    "peft": Format(title="PEFT's fused layout, loaded by PEFT alone", writer="superexperts.adapters.fused"),
    "vllm": Format(
        title="one key for each expert, as serving engines read them", writer="superexperts.adapters.per_expert"
    ),
    "peft-0.18": Format(
        title="PEFT's fused layout, as versions before 0.19 wrote it", reader="superexperts.adapters.fused:PEFT_018"
    ),
    "peft-0.19": Format(title="PEFT's fused layout", reader="superexperts.adapters.fused:PEFT_019"),
    "stacked": Format(title="one 3-D A and B for the experts of a layer", reader="superexperts.adapters.stacked"),
    "per-expert": Format(title="one key for each expert", reader="superexperts.adapters.per_expert"),
    "unsloth": Format(title="PEFT's, with B expert by expert", reader="superexperts.adapters.fused:UNSLOTH"),
    "unsloth-peft-0.18": Format(
        title="peft-0.18, with B expert by expert", reader="superexperts.adapters.fused:UNSLOTH_PEFT_018"
    ),
}
"""By the name that users give. `import` asks the readers in this order."""


def writable() -> tuple[str, ...]:
    """Names of the layouts that `export` writes."""
    return tuple(name for name, entry in FORMATS.items() if entry.writer is not None)


def readable() -> tuple[str, ...]:
    """Names of the layouts that `import` reads."""
    return tuple(name for name, entry in FORMATS.items() if entry.reader is not None)
