"""Checkpoints in float8 with a scale for each block of a matrix, as DeepSeek-V3 and R1 are published, read as bfloat16.

A weight is its float8 value times the scale of its block (DeepSeek-V3, inference/kernel.py, `weight_dequant`). Blocks
at the right and lower edges may be smaller.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.core.errors import ModelError

__all__ = ["Float8Checkpoint", "is_quantized", "opened"]

SCALES = "_scale_inv"
"""Suffix of the key of a matrix's scales: key of the matrix + this."""


def is_quantized(settings: Any) -> bool:
    """Whether a model's config says that its checkpoint is quantized."""
    return vars(settings).get("quantization_config") is not None  # transformers sets it where config.json has it


def opened(folder: Path, settings: Any, field: str = "model") -> Checkpoint:
    """The checkpoint of a model with the config `settings`, in float8 blocks or not quantized.

    `ModelError` about `field`, the setting that named the folder, for any other quantization.
    """
    if not is_quantized(settings):
        return Checkpoint(folder, field)
    said: Mapping[str, Any] = settings.quantization_config
    block = said.get("weight_block_size")
    if said.get("quant_method") != "fp8" or not isinstance(block, list) or len(block) != 2 or min(block) < 1:
        raise ModelError(
            f"{str(folder)!r} is quantized in a way that is not read here ({said.get('quant_method')}, "
            f"blocks {block}); use its bfloat16 checkpoint",
            field=field,
        )
    return Float8Checkpoint(folder, (block[0], block[1]), field)


class Float8Checkpoint(Checkpoint):
    """A checkpoint that shows its float8 matrices as bfloat16 ones, and their scales not at all.

    An entry's `offset` and `nbytes` are those in the shard. `ModelError` for a matrix without fitting scales.
    """

    def __init__(self, folder: Path, block: tuple[int, int], field: str = "model") -> None:
        super().__init__(folder, field)
        self._block = block
        self._quantized: dict[str, tuple[Entry, Entry]] = {}
        """key -> the matrix and its scales as they are stored"""
        try:
            for key, entry in list(self._entries.items()):
                if entry.dtype == torch.float8_e4m3fn and not key.endswith(SCALES):
                    self._quantized[key] = entry, self._scales_of(entry)
        except BaseException:
            self.close()
            raise
        for key, (entry, scales) in self._quantized.items():
            self._entries[key] = dataclasses.replace(entry, kind="BF16")
            del self._entries[scales.key]

    def _scales_of(self, entry: Entry) -> Entry:
        scales = self._entries.get(entry.key + SCALES)
        grid = tuple(math.ceil(size / step) for size, step in zip(entry.shape, self._block, strict=False))
        if scales is None or len(entry.shape) != 2 or scales.shape != grid:
            has = "no scales" if scales is None else f"scales of {list(scales.shape)}, not {list(grid)}"
            raise ModelError(
                f"{str(self.folder)!r} has {has} for the float8 {entry.key!r} {list(entry.shape)}; fetch it again",
                field=self.field,
            )
        return scales

    def read_in_place(self, entries: Sequence[Entry], memory: Tensor) -> Tensor | None:
        """As `Checkpoint.read_in_place`; None for float8 matrices, which are made as they are read."""
        return (
            None if any(entry.key in self._quantized for entry in entries) else super().read_in_place(entries, memory)
        )

    def read_into(self, entry: Entry, target: Tensor) -> None:
        """As `Checkpoint.read_into`; a float8 matrix into bfloat16."""
        if entry.key not in self._quantized:
            super().read_into(entry, target)
            return
        stored, scales = self._quantized[entry.key]
        weight_OI, scale = (torch.empty(part.shape, dtype=part.dtype) for part in (stored, scales))
        super().read_into(stored, weight_OI)
        super().read_into(scales, scale)
        target.copy_(_product(weight_OI, scale.float(), self._block))


def _product(weight_OI: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block times its scale, in float32 [O, I]."""
    # In float32, and rounded to bfloat16 once: float8 times float32 has more digits than bfloat16 holds.
    wide_OI = weight_OI.float()
    rows, columns = block
    # Strip by strip and in place: a scale matrix of full size would double the memory of a large weight.
    for index, strip in enumerate(torch.split(wide_OI, rows)):
        strip *= scale[index].repeat_interleave(columns)[: strip.shape[1]]
    return wide_OI
