"""The benchmarks as lm-evaluation-harness tasks: items, prompts, and where the rows come from."""

from .fewshot import choice_labels, with_examples
from .items import Item, prompt, read_item
from .loading import FILE_STEMS, Benchmark, Part, load_benchmarks

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
