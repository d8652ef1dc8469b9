"""A study's folder made by hand: small enough to know every number, with generations that attack the page."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from superexperts.core.runs import read_json, write_json, write_manifest, write_text
from superexperts.core.types import Answer, CorpusProfile, ExpertSet, ExpertStats, Extraction, Profile, Score
from superexperts.results.conclude import conclude
from superexperts.results.results import RESULTS_SCHEMA
from superexperts.results.statistics.paired import compare
from superexperts.results.statistics.single_run import holm, score
from superexperts.results.variants import Run

TASKS = ("mmlu", "boolq")
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "\x00\x1b[31mred\x1b[0m \u202eevil <!--<script> &lt;b&gt; ]]> {{ 7 * 7 }} \udcff needle"
)

# one letter an item: + right, - wrong, ? unparsed; 40 items of mmlu and 20 of boolq
CORRECT: dict[str, dict[str, str]] = {
    "base": {"mmlu": "+" * 30 + "-" * 10, "boolq": "+" * 14 + "-" * 6},
    "prune-super": {"mmlu": "+" * 10 + "?" * 20 + "-" * 10, "boolq": "+" * 8 + "-" * 12},
    "prune-random": {"mmlu": "+" * 29 + "-" * 10 + "+", "boolq": "+" * 14 + "-" * 6},
    "lora-super": {"mmlu": "+" * 38 + "-" * 2, "boolq": "+" * 19 + "-"},
    "lora-attention": {"mmlu": "+" * 37 + "-" * 3, "boolq": "+" * 20},
}
TITLES = {
    "base": "baseline",
    "prune-super": "prune super experts",
    "prune-random": "prune random experts",
    "lora-super": "LoRA on super experts",
    "lora-attention": 'LoRA on <b>"attention"</b>',
}
EXPERTS = {"prune-super": ["L1E2", "L2E5"], "prune-random": ["L1E0", "L2E1"], "lora-super": ["L2E5", "L1E2"]}
PERPLEXITY = {"base": 6.0, "prune-super": 15.0, "prune-random": 6.03, "lora-super": 5.9, "lora-attention": None}


def extractions(variant: str) -> dict[str, list[Extraction]]:
    return {
        task: [
            Extraction(
                id=f"{task}-{i}",
                extracted=None if c == "?" else "B",
                how="unparsed" if c == "?" else "rule:label",
                correct=c == "+",
            )
            for i, c in enumerate(pattern)
        ]
        for task, pattern in CORRECT[variant].items()
    }


def table(variant: str, task: str | None = None) -> Any:
    """Right (1) or wrong (0) of the variant's one run, [1, items]."""
    patterns = [CORRECT[variant][name] for name in TASKS if task in (None, name)]
    return np.array([[mark == "+" for pattern in patterns for mark in pattern]], dtype=float)


@functools.cache  # the bootstrap takes its time
def compared(one: str, other: str, task: str | None, tests: int) -> dict[str, Any]:
    return compare(table(one, task), table(other, task), tests=tests)


def comparison_rows(family: str, pairs: list[tuple[str, str, str | None]]) -> list[dict[str, Any]]:
    rows = [
        {"family": family, "variant": one, "reference": other, "task": task} | compared(one, other, task, len(pairs))
        for one, other, task in pairs
    ]
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["adjusted"] = p
    return rows


def results_json(variants: Mapping[str, str] = TITLES) -> dict[str, Any]:
    rows = []
    for name, title in variants.items():
        scores = [score(task, name, rows) for task, rows in extractions(name).items()]
        perplexity = PERPLEXITY[name]
        run = {
            "name": name,
            "seed": 0,
            "experts": EXPERTS.get(name),
            "trainable_parameters": 12_345 if name.startswith("lora") else None,
            "exposure": {"L1E2": 100, "L2E5": 50} if name == "lora-super" else None,
            "perplexity": perplexity,
            "perplexity_interval": None if perplexity is None else [perplexity - 0.5, perplexity + 0.5],
            "scores": [one.to_json() for one in scores],
        }
        together = [
            {field: value for field, value in one.to_json().items() if field != "variant"}
            | {"runs": 1, "clustered": None}
            for one in scores
        ]
        rows.append(
            {
                "name": name,
                "title": title,
                "kind": name.split("-")[0],
                "target": None if name == "base" else name.split("-")[1],
                "random": "lora" in name or "random" in name,
                "runs": [run],
                "mean": sum(one.accuracy for one in scores) / len(scores),
                "perplexity": perplexity,
                "scores": together,
            }
        )
    others = [name for name in variants if name != "base"]
    controls = [("prune-super", "prune-random"), ("lora-super", "lora-attention")]
    return {
        "schema": RESULTS_SCHEMA,
        "name": "by <i>hand</i>",
        "model": "pocket",
        "revision": None,
        "limit": 40,
        "protocol": "generate",
        "corpora": ["pocket"],
        "tasks": list(TASKS),
        "variants": rows,
        "comparisons": [
            *comparison_rows("base", [(name, "base", None) for name in others]),
            *comparison_rows("benchmark", [(name, "base", task) for name in others for task in TASKS]),
            *comparison_rows("control", [(*pair, None) for pair in controls if set(pair) <= set(others)]),
        ],
    }


def profile(layers: int = 5, experts: int = 8, dense: int = 1, peak: float = 900.0) -> Profile:
    """A dense first layer, one expert that no token reached, a shared expert, and L1E2 and L2E5 far above the rest."""
    rows = []
    for layer in range(dense, layers):
        for expert in (*range(experts), "shared"):
            reached = (layer, expert) != (dense, 0)
            value = {(1, 2): peak, (2, 5): peak / 2}.get((layer, expert), 1.0 + (layer * 7 + len(str(expert)) % 5) / 9)
            rows.append(
                ExpertStats(
                    layer=layer,
                    expert=expert,  # type: ignore[arg-type]
                    tokens=9 if reached else 0,
                    output_max=value if reached else 0.0,
                    channel=3 if reached else None,
                    position=0 if reached else None,
                    token_id=1 if reached else None,
                )
            )
    return Profile(
        model="pocket", num_layers=layers, corpora={"pocket": CorpusProfile(tokens=100, experts=tuple(rows))}
    )


def build(folder: Path, titles: Mapping[str, str] = TITLES) -> Path:
    """Writes everything that `study` leaves for the report."""
    write_json(folder / "results.json", results_json(titles))
    write_json(folder / "profile" / "profile.json", profile().to_json())
    rule = {"name": "super", "percentile": 99.5, "ratio": 10.0, "depth": 0.75}
    chosen = ExpertSet(model="pocket", rule=rule, experts=((1, 2), (2, 5)), scores=(900.0, 450.0))
    write_json(folder / "experts" / "super.json", chosen.to_json())
    for name in titles:
        where = folder / "variants" / name
        for task, rows in extractions(name).items():
            answers = [
                Answer(
                    id=row.id,
                    prompt=f"Question {row.id} <em>?</em>",
                    response=HOSTILE if i % 3 == 0 else f"The answer is B ({name}).",
                    gold="B",
                    choices=(("A", "a"), ("B", "b")),
                    kind="choice",
                    task=task,
                    variant=name,
                    seed=0,
                )
                for i, row in enumerate(rows)
            ]
            for kind, lines in (("answers", answers), ("extractions", rows)):
                text = "".join(json.dumps(line.to_json()) + "\n" for line in lines)  # type: ignore[attr-defined]
                write_text(where / kind / f"{task}.jsonl", text)
        if name.startswith("lora"):
            write_json(where / "train" / "training.json", {"loss": [[0, 2.0], [5, 1.0], [10, 0.5]]})
        write_manifest(where, "evaluate", {"options": {"limit": "40"}, "model": "ab" * 32}, [], 1.5)
    return folder


RUNS = [
    Run(
        name=name + (f"-s{seed}" if seed else ""),
        variant=name,
        kind=kind,
        target=target,
        seed=seed,
        experts=experts,
        drawn=target == "random",
    )
    for name, kind, target, experts, seeds in (
        ("base", "base", None, None, 1),
        ("prune-super", "prune", "super", "super", 1),
        ("prune-random", "prune", "random", "random", 1),
        ("lora-super", "lora", "super", "super", 3),
        ("lora-attention", "lora", "attention", None, 1),
    )
    for seed in range(seeds)
]


def build_runs(folder: Path) -> Path:
    """As `build`, with three runs of one variant: the second has one item less right, the third answers otherwise."""
    build(folder)
    for seed in (1, 2):
        shutil.copytree(folder / "variants" / "lora-super", folder / "variants" / f"lora-super-s{seed}")
    second = folder / "variants" / "lora-super-s1" / "extractions" / "boolq.jsonl"
    rows = [json.loads(line) for line in second.read_text(encoding="utf-8").splitlines()]
    rows[0]["correct"] = False
    second.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    third = folder / "variants" / "lora-super-s2" / "answers" / "boolq.jsonl"
    answers = [json.loads(line) for line in third.read_text(encoding="utf-8").splitlines()]
    third.write_text("".join(json.dumps(row | {"response": "otherwise"}) + "\n" for row in answers), encoding="utf-8")
    random = ExpertSet(model="pocket", rule={"name": "random"}, experts=((1, 0), (2, 1)), scores=(None, None))
    write_json(folder / "experts" / "random.json", random.to_json())
    for run in RUNS:
        where = folder / "variants" / run.name
        scores: list[Score] = []
        for task in TASKS:
            lines = (where / "extractions" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
            scores.append(score(task, run.name, [Extraction.from_json(json.loads(line)) for line in lines]))
        write_json(where / "scores.json", {"scores": [one.to_json() for one in scores]})
        if run.kind == "lora":
            log = read_json(where / "train" / "training.json", "training")
            more = {
                "eval_loss": [[5, 0.9], [10, 0.6 + run.seed / 10]],
                "trainable_parameters": 24_690 // (run.seed + 1),
            }
            write_json(where / "train" / "training.json", log | more | {"exposure": {"L1E2": 1_000, "L2E5": 50}})
            (where / "train" / "adapter").mkdir()
    results = conclude(
        folder, RUNS, name="by hand", model="pocket", revision=None, limit=40, protocol="generate", corpora=["pocket"],
        tasks=TASKS,
    )  # fmt: skip
    write_json(folder / "results.json", results)
    shares = {"layers": [{"layer": n, "before": [0.1 * n, 0.2], "after": [0.05, 0.1], "decay": 0.5} for n in range(5)]}
    write_json(folder / "profile" / "sinks.json", shares | {"experts": ["L1E2", "L2E5"]})
    write_text(folder / "study.yaml", "# <b>how</b> ``` it was run\nname: by hand\ntrain_data: rows/train.json\n")
    options = {"learning_rate": "0.003", "attention": "False", "projections": "gate,up,down", "recipe": "None"}
    key = {"options": options, "experts": [[1, 2], [2, "shared"]]}
    write_manifest(folder / "variants" / "lora-super" / "train", "train", key, [], 2.5)
    return folder
