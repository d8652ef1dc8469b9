"""Time of `evaluate` over that of lm-evaluation-harness's own evaluation of the same requests.

    python benchmarks/evaluation_ratio.py --limit 200

Both load the pocket model, read the files of the six benchmarks and answer the same prompts greedily, in turn in one
process. `evaluate` also checks every row, hashes its inputs, syncs each batch to disk, and writes the answers and a
manifest. The harness builds its requests, generates, and lists its samples.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM

from superexperts.benchmarks import BENCHMARKS, default_benchmarks, loading
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import quiet
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.pocket import write_checkpoint, write_data


def by_evaluate(model: Path, data: Path, limit: int, batch_size: int, tokens: int, out: Path) -> float:
    """Seconds of the command, without the start of Python."""
    loading._local_cached.cache_clear()
    begin = time.perf_counter()
    evaluate.run(
        EvaluateConfig(
            model=str(model), data_dir=data, limit=limit, batch_size=batch_size, max_new_tokens=tokens, out=out,
            device="cpu", dtype="float32",
        )
    )  # fmt: skip
    return time.perf_counter() - begin


def by_harness(model: Path, data: Path, limit: int, batch_size: int, tokens: int) -> float:
    """Seconds of what `lm-eval run` does with the same tasks and rows."""
    begin = time.perf_counter()
    sources = {
        name: {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {BENCHMARKS[name].split: str(data / f"{BENCHMARKS[name].file}.jsonl")},
                "cache_dir": str(model.parent / f"cache-{begin}"),
            },
        }
        for name in default_benchmarks()
    }
    with quiet():
        tasks: dict[str, Any] = {name: loading.harness_task(name, source) for name, source in sources.items()}
        for task in tasks.values():
            task.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)
        model_of_harness = HFLM(pretrained=str(model), batch_size=batch_size, dtype="float32", device="cpu")
        found = lm_eval.evaluate(model_of_harness, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    assert sum(map(len, found["samples"].values())) == limit * len(default_benchmarks())
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="items per benchmark")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "model")
        (folder / "data").mkdir()
        write_data(folder / "data")
        how = (folder / "model", folder / "data", options.limit, options.batch_size, options.max_new_tokens)
        ratios = []
        for number in range(options.rounds + 1):  # the first round imports and fills the page cache; it does not count
            theirs, ours = by_harness(*how), by_evaluate(*how, folder / f"out-{number}")
            if number:
                ratios.append(ours / theirs)
                print(f"evaluate {ours:.2f} s, the harness {theirs:.2f} s: {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
