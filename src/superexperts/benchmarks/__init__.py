"""The benchmarks as lm-evaluation-harness tasks: items, prompts, and where the rows come from."""

from superexperts.benchmarks.fewshot import choice_labels, with_examples
from superexperts.benchmarks.items import Item, prompt, read_item
from superexperts.benchmarks.loading import FILE_STEMS, Benchmark, Part, load_benchmarks

__all__ = [
    "FILE_STEMS",
    "Benchmark",
    "Item",
    "Part",
    "choice_labels",
    "load_benchmarks",
    "prompt",
    "read_item",
    "with_examples",
]
