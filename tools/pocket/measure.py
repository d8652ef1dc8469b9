"""The figures of the pocket model: perplexity with and without its super experts, and the six pocket benchmarks.

These are plain loops over the stock model, so that the figures do not depend on the code that they are used to test.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from tools.pocket.architecture import FIRST, SECOND
from tools.pocket.pools import pools
from tools.pocket.questions import KINDS, Question, prompt
from tools.pocket.training import perplexity, silence
from tools.pocket.world import heldout

__all__ = ["check", "measure", "random_others", "respond", "right", "scores"]

TOLERANCES = {"perplexity": 0.05, "score": 0.10}
"""relative for perplexities; absolute for a benchmark's share of right answers. A rebuild on another machine sums
floating-point numbers in another order, which training amplifies."""


def random_others(seed: int, num_experts: int = 72) -> list[tuple[int, int]]:
    """One ordinary expert in each layer of a super expert."""
    rng = random.Random(seed)
    return [(layer, rng.choice([e for e in range(num_experts) if e != expert])) for layer, expert in (FIRST, SECOND)]


@torch.no_grad()
def respond(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, batch_size: int = 100
) -> list[str]:
    """Greedy responses of at most 40 tokens."""
    responses: list[str] = []
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[i : i + batch_size]), return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=40, do_sample=False
        )
        responses += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return responses


def right(question: Question, response: str) -> bool:
    """Whether a response ends in the gold answer, in either of the two forms that the model was taught."""
    found = re.findall(r"(?:The answer is|####) ([^.\n]+)", response)
    return bool(found) and found[-1].strip() == question.said


def scores(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, limit: int = 200) -> dict[str, float]:
    """kind -> share of right answers over the first `limit` test questions."""
    shares = {}
    for kind in KINDS:
        questions = pools()[kind][0][:limit]
        responses = respond(model, tokenizer, [prompt(question) for question in questions])
        shares[kind] = sum(map(right, questions, responses)) / len(questions)
    return shares


def measure(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """All figures, for a model in float32. Random pruning is the mean of five draws."""
    model.eval()
    texts = list(heldout())

    def pruned(experts: Iterable[tuple[int, int]]) -> float:
        with silence(model, experts):
            return perplexity(model, tokenizer, texts)

    with silence(model, (FIRST, SECOND)):
        scores_pruned = scores(model, tokenizer)
    return {
        "perplexity": perplexity(model, tokenizer, texts),
        "perplexity_pruned": pruned((FIRST, SECOND)),
        "perplexity_first_pruned": pruned((FIRST,)),
        "perplexity_second_pruned": pruned((SECOND,)),
        "perplexity_random_pruned": sum(pruned(random_others(seed)) for seed in range(5)) / 5,
        "scores": scores(model, tokenizer),
        "scores_pruned": scores_pruned,
    }


def check(measured: Mapping[str, Any], shipped: Mapping[str, Any]) -> list[str]:
    """The figures that differ from the shipped ones by more than the tolerances, one line each."""
    complaints = []
    for name, want in shipped.items():
        got = measured[name]
        if isinstance(want, Mapping):
            for kind, share in want.items():
                if abs(got[kind] - share) > TOLERANCES["score"]:
                    complaints.append(f"{name}.{kind} is {got[kind]:.3f}, shipped {share:.3f}")
        elif abs(got / want - 1) > TOLERANCES["perplexity"]:
            complaints.append(f"{name} is {got:.4f}, shipped {want:.4f}")
    return complaints
