"""Perplexity against a brute-force loop and against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from superexperts.errors import ModelError
from superexperts.perplexity import perplexity


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
        with pytest.raises(ModelError, match="--dtype float32"):
            perplexity(model, ids_BL)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
