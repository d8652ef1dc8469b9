"""Fast attention on a CPU where a family's values are narrower than its keys, as in multi-head latent attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["padded_values"]


@contextlib.contextmanager
def padded_values() -> Iterator[None]:
    """Within the block, "sdpa" pads narrow values with zeros to the width of the keys, and trims its output.

    Torch's fused CPU kernel needs keys and values of the same width. Otherwise torch computes the full score matrix,
    which takes three times as long (measured on DeepSeek-V2: keys of width 192, values of 128).
    """
    # An instance entry shadows transformers' global one, so deleting it restores the stock function.
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _padded
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    width = value.shape[-1]
    if value.device.type == "cpu" and width < key.shape[-1]:
        # Zero columns of the values only add zero columns to the output, so cutting them off again changes nothing.
        value = F.pad(value, (0, key.shape[-1] - width))
    answer, _ = sdpa_attention_forward(module, query, key, value, *arguments, **options)
    return answer[..., :width].contiguous(), None
