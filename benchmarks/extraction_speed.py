"""How fast the rules read answers, and how long `evaluate` takes beyond the harness's own generation calls.

    python benchmarks/extraction_speed.py --labelled extraction_dev.jsonl

The rules read the labelled generations several times, on one core and, as `extract` does, on all cores; the fastest
round counts, since others may use the machine. Then `evaluate` asks the pocket model its six benchmarks, or those of
--data-dir, in a temporary folder. `TransformersModel.replies` is generation. The rest is split into work for
each item (prompts, order, journal, answers) and work once a run (loading the model, data, manifest). Last, one core
reads the pocket model's answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from superexperts.benchmarks import default_benchmarks
from superexperts.core.prompt import prompt_of
from superexperts.core.types import Answer
from superexperts.engines.harness import TransformersModel
from superexperts.evaluation import evaluate
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.extraction.audit import KINDS
from superexperts.extraction.scores import extract, extract_all


def labelled(path: Path) -> list[Answer]:
    """The generations of a labelled file, as answers."""
    answers = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        choices = tuple((choice["label"], choice["text"]) for choice in row["choices"])
        answers.append(
            Answer(
                id=row["id"], prompt=prompt_of(row["question"]), response=row["generation"], gold=str(row["gold"]),
                choices=choices, kind=KINDS[row["task_type"]], task="labelled", variant="base", seed=0,
            )
        )  # fmt: skip
    return answers


def rate(answers: Sequence[Answer], rounds: int, read: Callable[[Sequence[Answer]], object]) -> float:
    """Answers a second in the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        read(answers)
        best = min(best, time.perf_counter() - begin)
    return len(answers) / best


def by_one(answers: Sequence[Answer]) -> None:
    """Does what `extract_all` does on one core."""
    for answer in answers:
        extract(answer)


def show_rates(name: str, answers: Sequence[Answer], rounds: int, several: bool) -> None:
    kinds = sorted({answer.kind for answer in answers})
    for kind, mine in [("all", list(answers)), *((k, [a for a in answers if a.kind == k]) for k in kinds)]:
        length = sum(len(answer.response) for answer in mine) / len(mine)
        line = f"{rate(mine * -(-5000 // len(mine)), rounds, by_one):,.0f} answers a second on one core"
        if several:
            line += f", {rate(mine * -(-50_000 // len(mine)), rounds, extract_all):,.0f} on all"
        print(f"{name}, {kind}: {line} ({len(mine)} answers of {length:.0f} characters on average)")


class Timed:
    """Replaces a function and adds up the time spent in it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        function = getattr(owner, name)

        def timed(*arguments: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(owner, name, timed)


def evaluated(limit: int, folder: Path, data_dir: Path, batch_size: int) -> list[Answer]:
    """The pocket model's answers to a sample of each benchmark."""
    evaluate.run(
        EvaluateConfig(
            data_dir=data_dir, limit=limit, batch_size=batch_size, out=folder, device="cpu"
        )
    )  # fmt: skip
    return [
        Answer.from_json(json.loads(line))
        for task in default_benchmarks()
        for line in (folder / "answers" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=Path, help="JSONL of labelled generations, as for extract --audit")
    parser.add_argument("--data-dir", type=Path, default=Path("pocket"), help="folder of the benchmarks' files")
    parser.add_argument("--limit", type=int, default=200, help="items per benchmark")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if (
        options.labelled is not None
    ):  # first, since `extract` reads on all cores only before any library has started threads
        show_rates("labelled generations", labelled(options.labelled), options.rounds, several=True)
    with tempfile.TemporaryDirectory() as temporary:
        # The first run imports and fills the page cache; it does not count.
        evaluated(2, Path(temporary) / "warm", Path("pocket"), options.batch_size)
        whole, asking, generation = (
            Timed(evaluate, "run"), Timed(evaluate, "ask_one"), Timed(TransformersModel, "replies")
        )  # fmt: skip
        answers = evaluated(options.limit, Path(temporary) / "timed", options.data_dir, options.batch_size)
    beyond, once = asking.seconds - generation.seconds, whole.seconds - asking.seconds
    print(f"evaluate: {len(answers)} answers in {whole.seconds:.2f} s, {generation.seconds:.2f} s of it generation")
    print(
        f"asking beyond generation: {1000 * beyond / len(answers):.2f} ms an answer, {beyond / generation.seconds:.2%}"
    )
    share = (beyond + once) / generation.seconds
    print(f"once a run (model, data, files): {once:.2f} s; all beyond generation: {share:.2%}")
    show_rates("the pocket model's answers", answers, options.rounds, several=False)


if __name__ == "__main__":
    main()
