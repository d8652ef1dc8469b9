"""Attention with padded values is the stock one's, and is gone after the block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from superexperts.models.cpu_attention import padded_values


@pytest.mark.parametrize("width", [4, 12, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_narrow_values_are_attended_to_as_they_are(width: int, masked: bool, groups: int) -> None:
    """Against the sums written out, query by query."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 12), torch.randn(2, 4 // groups, 7, 12)
    value = torch.randn(2, 4 // groups, 7, width)
    module = nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[3:, 0] = False
    with padded_values():
        answer, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    assert answer.shape == (2, 7, 4, width)
    for head in range(4):
        for at in range(7):
            seen = [k for k in range(at + 1) if mask is None or mask[at, k]]
            scores = (key[:, head // groups, seen] @ query[:, head, at, :, None])[..., 0] * 0.3
            want = (scores.softmax(-1)[..., None] * value[:, head // groups, seen]).sum(1)
            torch.testing.assert_close(answer[:, at, head], want)


def test_it_ends_with_the_block() -> None:
    with padded_values():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
