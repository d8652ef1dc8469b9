"""Lists and numbers in the forms in which people type them."""

from __future__ import annotations

import pytest

from superexperts.core.arguments import read_arguments
from superexperts.core.settings import plain_number, typed
from superexperts.evaluation.evaluate import EvaluateConfig, rewrite_arguments
from superexperts.surgery.prune import PruneConfig


@pytest.mark.parametrize(
    ("text", "number"),
    [("10k", "10000"), ("1M", "1000000"), ("1.5K", "1500"), ("16384", "16384"), ("0.0001k", "0.0001k"), ("k", "k")],
)
def test_numbers_with_a_letter(text: str, number: str) -> None:
    assert plain_number(text) == number


def test_whole_numbers_on_the_command_line_and_in_a_file() -> None:
    words = ["--experts", "L1E1", "--mode", "mean", "--tokens", "20k", "--seq-len=1k"]
    config = read_arguments(PruneConfig, "prune", words)
    assert (config.tokens, config.seq_len) == (20000, 1000)
    assert typed("20k", int) == 20000


@pytest.mark.parametrize("words", [["L2E5", "L1E7"], ["L2E5,", "L1E7"], ["L2E5,L1E7"]])
def test_experts_as_several_words(words: list[str]) -> None:
    config = read_arguments(PruneConfig, "prune", ["pocket", "--experts", *words, "--json"])
    assert (config.experts, config.model) == ("L2E5,L1E7", "pocket")


@pytest.mark.parametrize("words", [["MMLU", "gsm8k"], ["mmlu, GSM8K"], ["mmlu,", "gsm8k"], ["mmlu gsm8k"]])
def test_benchmarks_in_any_case_and_as_several_words(words: list[str]) -> None:
    config = read_arguments(EvaluateConfig, "evaluate", rewrite_arguments(["pocket", "--tasks", *words, "--json"]))
    assert (config.tasks, config.model) == ("mmlu,gsm8k", "pocket")
    assert config == EvaluateConfig(tasks="mmlu,gsm8k", json=True)
