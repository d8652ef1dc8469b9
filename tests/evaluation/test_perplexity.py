"""Perplexity against a brute-force loop and against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from superexperts.core.errors import ModelError
from superexperts.evaluation.perplexity import perplexity, perplexity_of


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_equals_brute_force_and_the_models_loss(model: LlamaForCausalLM) -> None:
    ids_BL = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    found = perplexity(model, ids_BL, batch_size=2)
    losses = []
    with torch.no_grad():
        for row in ids_BL:
            for place in range(1, len(row)):
                logits = model(row[None, :place]).logits[0, -1].double()
                losses.append(float(logits.logsumexp(0) - logits[row[place]]))
        loss = model(input_ids=ids_BL, labels=ids_BL).loss.item()
    assert len(losses) == 5 * 8
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found == pytest.approx(math.exp(loss), rel=1e-5)
    assert found == pytest.approx(perplexity(model, ids_BL, batch_size=5), rel=1e-6)


def test_not_a_number_is_an_error(model: LlamaForCausalLM) -> None:
    ids_BL = torch.zeros(1, 4, dtype=torch.long)
    weight = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(ModelError, match="dtype float32"):
            perplexity(model, ids_BL)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)


def test_interval_of_four_sequences_by_hand() -> None:
    """Mean 2, standard deviation 1, t quantile of three degrees of freedom 3.1824 (a printed table)."""
    losses_B = torch.tensor([2 - math.sqrt(1.5), 2.0, 2.0, 2 + math.sqrt(1.5)], dtype=torch.float64)
    found = perplexity_of(losses_B)
    assert found.value == pytest.approx(math.exp(2))
    assert found.interval == pytest.approx((math.exp(2 - 1.5912), math.exp(2 + 1.5912)), rel=1e-4)
    assert perplexity_of(losses_B[:1]).interval is None


def test_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    losses_SB = torch.randn(4000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3 + 1.5
    intervals = [perplexity_of(losses_B).interval for losses_B in losses_SB]
    inside = sum(low <= math.exp(1.5) <= high for low, high in filter(None, intervals))
    assert 0.94 <= inside / 4000 <= 0.96
