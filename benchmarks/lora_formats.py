"""Four adapters of the pocket model, each evaluated as trained and in every export format: are the scores the same?

    python benchmarks/lora_formats.py --folder runs/formats

Trains each of recipes/train/pocket-*.yaml on the pocket model's rows, exports it, and evaluates every format on the six
benchmarks, each in a new process: `adapter` and `peft` with `evaluate --adapter`, `merged` as a checkpoint, `vllm`
after `import` has read it back. Prints a table in Markdown: accuracy in %, and how many answers differ from those of
the adapter itself. Finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from superexperts.cli import main as main_of_package

RECIPES = Path(__file__).parents[1] / "recipes" / "train"
TITLES = {
    "super": "super experts",
    "random": "random experts of their layers",
    "routed": "most-routed experts",
    "attention": "attention",
}
TASKS = ("mmlu", "arc_easy", "gsm8k", "boolq", "medqa", "vmlu")


def superexperts(*arguments: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main_of_package([*map(str, arguments), "--json"])
    if code:
        raise SystemExit(code)


def evaluated(data: Path, limit: int, out: Path, *what: str | Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Accuracy in % and answers, by benchmark."""
    options = ["--data-dir", data, "--limit", limit, "--limit-first", "--max-new-tokens", "48", "--out", out]
    command = [sys.executable, "-m", "superexperts", "evaluate", *what, *options]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    superexperts("extract", out)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    answers = {
        task: [json.loads(line)["response"] for line in (out / "answers" / f"{task}.jsonl").read_text().splitlines()]
        for task in TASKS
    }
    return {score["task"]: 100 * score["correct"] / score["items"] for score in scores}, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/formats"), help="folder for all output")
    parser.add_argument("--limit", type=int, default=100, help="items per benchmark")
    options = parser.parse_args()
    folder, limit = options.folder, options.limit
    data = folder / "data"
    if not data.is_dir():
        superexperts("pocket", "--out", folder / "pocket", "--data", data)
    print("| LoRA on | parameters | format | " + " | ".join(TASKS) + " | mean | other answers |")
    print("| --- " * (len(TASKS) + 5) + "|")

    def row(title: str, parameters: str, name: str, scores: dict[str, float], others: str) -> None:
        cells = " | ".join(f"{scores[task]:.1f}" for task in TASKS)
        mean = sum(scores[task] for task in TASKS) / len(TASKS)
        print(f"| {title} | {parameters} | {name} | {cells} | {mean:.2f} | {others} |", flush=True)

    scores, _ = evaluated(data, limit, folder / "base", "pocket")
    row("none", "0", "base model", scores, "")
    for name, title in TITLES.items():
        own = folder / name
        superexperts(
            "train", "--recipe", RECIPES / f"pocket-{name}.yaml", "--data", data / "train.json", "--out", own / "train"
        )  # fmt: skip
        parameters = json.loads((own / "train" / "training.json").read_text())["trainable_parameters"]
        for layout in ("merged", "peft", "vllm"):
            superexperts("export", own / "train", "--format", layout, "--out", own / layout)
        superexperts("import", own / "vllm", "pocket", "--out", own / "imported")
        ways: dict[str, list[str | Path]] = {
            "adapter": ["pocket", "--adapter", own / "train" / "adapter"],
            "merged": [own / "merged"],
            "peft": ["pocket", "--adapter", own / "peft"],
            "vllm, imported": ["pocket", "--adapter", own / "imported" / "adapter"],
        }
        first: dict[str, list[str]] = {}
        for way, what in ways.items():
            scores, answers = evaluated(data, limit, own / "answers" / way.partition(",")[0], *what)
            first = first or answers
            pairs = [pair for task in TASKS for pair in zip(first[task], answers[task], strict=True)]
            others = f"{sum(a != b for a, b in pairs)} of {len(pairs)}" if way != "adapter" else ""
            row(title, f"{parameters:,}", way, scores, others)


if __name__ == "__main__":
    main()
