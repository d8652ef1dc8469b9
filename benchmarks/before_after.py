"""Time and peak memory of the main commands in two checkouts of the project, in turn in one run.

    python benchmarks/before_after.py --before OLD/src --after NEW/src --folder DIR

Every command runs as a whole process, with PYTHONPATH set to one of the two source folders. Each round runs a command
in both checkouts, one directly after the other, and every second round in the opposite order, so that a machine that
becomes slower or faster does not favour either. An additional first round fills the page cache and is not counted.

Prints a table in Markdown: medians of the rounds of wall time (start of Python included) and of peak resident memory
(VmHWM of the process, without its children), and the medians of each round's ratio after / before. The test files (a
checkpoint of 2.2 GB, its copy, rows, answers) are made in DIR with the checkout that this script imports, and are kept
for the next run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from large_checkpoint import Shape, made, size_of
from watching import Ran, resident, watched

from superexperts.core.types import Answer
from superexperts.pocket import write_data

SHAPE = Shape(layers=8, vocabulary=8192, hidden=1024, dense=5472, expert=704)
"""Half the widths of DeepSeek-V2-Lite."""
EXPERTS = "L3E17,L6E40"
POCKET_EXPERTS = "L1E11,L3E54"
"""The pocket model's super experts."""
ANSWERS = 20_000
CHOICES = (("A", "the heart"), ("B", "the liver"), ("C", "the left lung"), ("D", "none of these"))
RESPONSES: dict[str, tuple[str, ...]] = {
    "choice": (
        "Oxygen enters the blood elsewhere, so that leaves one organ. The answer is (B).",
        "Let us compare the options.\nA is a muscle, C and D do not fit.\n\nFinal answer: B",
        "I am not sure, but the organ that is meant must be the liver.",
        "Both A and C are possible. It depends on what the question means.",
    ),
    "number": (
        "She buys 3 bags of 12 apples, so 3 * 12 = 36. She eats 4.\n#### 32",
        "The total is 1,250 dollars, and half of it is 625. Therefore the answer is \\boxed{625}.",
        "First 18 / 3 = 6 and then 6 + 7 = 13",
        "There is not enough information to compute this.",
    ),
    "yesno": ("Yes, the passage says so.", "No.", "The passage denies it, so the answer is no.", "It is unclear."),
}
TASKS = {"choice": "arc_easy", "number": "gsm8k", "yesno": "boolq"}
GOLD = {"choice": "B", "number": "32", "yesno": "yes"}


class Measured(NamedTuple):
    """A command and the exit code that it must have."""

    title: str
    arguments: list[str]
    code: int = 0


def write_answers(folder: Path) -> None:
    """Answers to made-up items of three benchmarks, as `evaluate` writes them."""
    folder.mkdir(parents=True)
    for number, (kind, responses) in enumerate(RESPONSES.items()):
        count = len(range(number, ANSWERS, len(RESPONSES)))
        with (folder / f"{TASKS[kind]}.jsonl").open("w", encoding="utf-8") as file:
            for item in range(count):
                answer = Answer(
                    id=f"item-{item}", prompt=f"Question: What does item {item} ask?\nAnswer:",
                    response=f"Step {item} first. {responses[item % len(responses)]}", gold=GOLD[kind],
                    choices=CHOICES if kind == "choice" else (), kind=kind, task=TASKS[kind], variant="base", seed=0,
                )  # type: ignore[arg-type]  # fmt: skip
                file.write(json.dumps(answer.to_json()) + "\n")


def prepare(folder: Path, rows: int) -> None:
    """Makes the files that the commands read, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    made(folder / "model", SHAPE)
    if not (folder / "copy").is_dir():
        shutil.copytree(folder / "model", folder / "copy")
    if not (folder / "answers").is_dir():
        write_answers(folder / "answers")
    if not (folder / "data").is_dir():
        (folder / "data").mkdir()
        write_data(folder / "data")
    training = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))
    (folder / "rows.json").write_text(json.dumps(training[:rows]), encoding="utf-8")


def commands(folder: Path, out: Path, tokens: int) -> list[Measured]:
    """The commands in order; `restore` and `export` read what `prune` and `train` wrote."""
    model = str(folder / "model")
    corpus = ["--corpus", "pocket"]
    training = ["--experts", POCKET_EXPERTS, "--data", str(folder / "rows.json"), "--epochs", "1", "--batch-size", "8"]
    every = [
        Measured("`profile pocket` (8,192 tokens)", ["profile", "pocket", *corpus, "--tokens=8192", "--seq-len=128"]),
        Measured(
            f"`profile --stream` ({tokens:,} tokens)",
            ["profile", model, "--stream", *corpus, f"--tokens={tokens}", "--seq-len=512"],
        ),
        Measured("`prune`", ["prune", model, "--experts", EXPERTS]),
        Measured("`restore`", ["restore", str(out / "prune")]),
        Measured("`train` (LoRA, pocket)", ["train", "pocket", *training, "--max-length=256", "--learning-rate=3e-3"]),
        Measured("`export --format merged`", ["export", str(out / "train"), "--format", "merged"]),
        Measured(
            "`evaluate` (600 of GSM8K, MMLU)",
            ["evaluate", "pocket", "--data-dir=pocket", "--tasks=gsm8k,mmlu", "--limit=600"],
        ),
    ]
    every = [command._replace(arguments=[*command.arguments, f"--out={out / name(command)}"]) for command in every]
    return [
        *every,
        Measured("`compare`", ["compare", model, str(folder / "copy"), "--expect-identical"]),
        Measured(f"`extract` ({ANSWERS:,} answers)", ["extract", str(out / "extract")]),
        Measured("`--help`", ["--help"]),
        Measured("`profile --help`", ["profile", "--help"]),
        Measured("a wrong option", ["profile", "pocket", "--no-such-option"], code=2),
    ]


def name(command: Measured) -> str:
    """The folder of its output: `profile pocket` (8,192 tokens) -> profile-pocket."""
    return command.title.partition(" (")[0].strip("`").replace(" ", "-")


def run(source: Path, command: Measured, folder: Path, out: Path) -> Ran:
    """Runs the command of one checkout, without what an earlier round left in its output folder."""
    shutil.rmtree(out / name(command), ignore_errors=True)
    if command.arguments[0] == "extract":
        shutil.copytree(folder / "answers", out / "extract" / "answers")
    # `env` becomes the process it starts, so that the memory measured is Python's.
    start = ["env", f"PYTHONPATH={source.resolve()}", sys.executable, "-m", "superexperts"]
    return watched([*start, *command.arguments], lambda process: resident("VmHWM", process), code=command.code)


def row(title: str, runs: list[tuple[Ran, Ran]]) -> str:
    """A line of the table from the pairs (before, after) of all rounds."""
    times = [[side.seconds for side in pair] for pair in runs]
    peaks = [[side.peak / 2**20 for side in pair] for pair in runs]
    cells = [title]
    for values, unit, digits in ((times, "s", 2), (peaks, "MiB", 0)):
        cells += [f"{median(side):,.{digits}f} {unit}" for side in zip(*values, strict=True)]
        cells.append(f"{median(after / before for before, after in values):.2f}x")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="source folder (src) of the older checkout")
    parser.add_argument("--after", type=Path, required=True, help="source folder (src) of the newer checkout")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the test files and the output")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of profile --stream")
    parser.add_argument("--rows", type=int, default=32, help="training rows")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="commands with one of these words in their title")
    options = parser.parse_args()
    sources: tuple[Path, Path] = (options.before, options.after)
    for source in sources:
        if not (source / "superexperts").is_dir():
            parser.error(f"{source} is not a source folder of the project: it has no folder superexperts")
    folder = options.folder.absolute()
    prepare(folder, options.rows)
    outs = (folder / "out" / "before", folder / "out" / "after")
    pairs = list(zip(*(commands(folder, out, options.tokens) for out in outs), strict=True))
    if options.only:
        pairs = [pair for pair in pairs if any(word in pair[0].title for word in options.only)]
    print(f"checkpoint of {size_of(SHAPE) / 1e9:.1f} GB; medians of {options.rounds} rounds\n")
    print("| command | before | after | time | memory before | memory after | memory |")
    print("| --- " * 7 + "|", flush=True)
    for pair in pairs:
        runs = []
        for number in range(options.rounds + 1):
            ran: dict[int, Ran] = {}
            for side in (0, 1) if number % 2 else (1, 0):
                ran[side] = run(sources[side], pair[side], folder, outs[side])
            if number:
                runs.append((ran[0], ran[1]))
        print(row(pair[0].title, runs), flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
