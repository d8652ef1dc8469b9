"""How fast the rules read, and what `evaluate` takes beyond the harness's own generation calls.

    python benchmarks/extraction_speed.py --labelled extraction_dev.jsonl

The rules read the labelled generations (or, without a file, the pocket model's answers) again and again, on one core
and as `extract` does, on all; the fastest of the rounds counts, for others may use the machine. `evaluate` asks the
pocket model its six benchmarks, or those of --data-dir, in a folder that is thrown away; what is spent inside
`HFLM.generate_until` is generation, all else is not: prompts, order, journal and answers of each item; the model's
loading, the data and the manifest once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from superexperts.core.config import TASKS, EvaluateConfig
from superexperts.core.prompt import prompt_of
from superexperts.core.types import Answer
from superexperts.evaluation import evaluate
from superexperts.extraction.audit import KINDS
from superexperts.extraction.extract import extract, extract_all


def labelled(path: Path) -> list[Answer]:
    """The generations of a labelled file as answers."""
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
    """What `extract_all` does where there is one core."""
    for answer in answers:
        extract(answer)


def show_rates(name: str, answers: Sequence[Answer], rounds: int, several: bool) -> None:
    kinds = sorted({answer.kind for answer in answers})
    for kind, mine in [("all", list(answers)), *((k, [a for a in answers if a.kind == k]) for k in kinds)]:
        length = sum(len(answer.response) for answer in mine) / len(mine)
        said = f"{rate(mine * -(-5000 // len(mine)), rounds, by_one):,.0f} answers a second by one core"
        if several:
            said += f", {rate(mine * -(-50_000 // len(mine)), rounds, extract_all):,.0f} by all"
        print(f"{name}, {kind}: {said} ({len(mine)} of {length:.0f} characters)")


class Timed:
    """Adds up the time spent in a function, which it takes the place of."""

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
            data_dir=data_dir, limit=limit, shuffle=True, batch_size=batch_size, out=folder, device="cpu"
        )
    )  # fmt: skip
    return [
        Answer.from_json(json.loads(line))
        for task in TASKS
        for line in (folder / "answers" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=Path, help="JSONL of labelled generations, as for extract --audit")
    parser.add_argument("--data-dir", type=Path, default=Path("pocket"), help="the benchmarks' files")
    parser.add_argument("--limit", type=int, default=200, help="items per benchmark")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.labelled is not None:  # first, for no thread of a library's runs yet: `extract` has none either
        show_rates("labelled generations", labelled(options.labelled), options.rounds, several=True)
    with tempfile.TemporaryDirectory() as temporary:
        evaluated(
            2, Path(temporary) / "warm", Path("pocket"), options.batch_size
        )  # imports, and the files' way from disk
        whole, asking, generation = (
            Timed(evaluate, "run"), Timed(evaluate, "ask_one"), Timed(HFLM, "generate_until")
        )  # fmt: skip
        answers = evaluated(options.limit, Path(temporary) / "timed", options.data_dir, options.batch_size)
    beyond, once = asking.seconds - generation.seconds, whole.seconds - asking.seconds
    print(f"evaluate: {len(answers)} answers in {whole.seconds:.2f} s, {generation.seconds:.2f} s of it generation")
    print(
        f"asking beyond generation: {1000 * beyond / len(answers):.2f} ms an answer, {beyond / generation.seconds:.2%}"
    )
    print(f"once a run (model, data, files): {once:.2f} s; all beyond: {(beyond + once) / generation.seconds:.2%}")
    show_rates("pocket's answers", answers, options.rounds, several=False)


if __name__ == "__main__":
    main()
