"""Six benchmarks as lm-evaluation-harness tasks: mmlu, gsm8k, arc_easy, boolq, medqa, vmlu."""

from .items import Item, prompt, read_item
from .loading import FILE_STEMS, Benchmark, load_benchmarks

__all__ = ["FILE_STEMS", "Benchmark", "Item", "load_benchmarks", "prompt", "read_item"]
