"""Rebuild the pocket model: `python -m tools.pocket.build --out DIR`, in the root of the repository.

Trains the tokenizer and the model on pocket text with a fixed seed, measures the result, and writes an ordinary
checkpoint folder. `--verify` measures a folder (by default the shipped one) against the shipped measurements.
`--data` generates the data files again and writes them over the shipped ones.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from superexperts.core.console import note, stderr
from superexperts.core.runs import new_folder, read_json, write_json, write_manifest
from superexperts.pocket import checkpoint_dir, data_dir
from tools.pocket.architecture import pocket_config, strengthen
from tools.pocket.data import ship
from tools.pocket.measure import check, measure
from tools.pocket.tokenizer import train_tokenizer
from tools.pocket.training import Recipe, batches, train
from tools.pocket.world import documents

__all__ = ["build", "main"]

DOCUMENTS = 10**9
"""more than any run reads; they are made one at a time"""
TOKENIZER_DOCUMENTS = 8000


def build(recipe: Recipe, *, progress: bool = True) -> tuple[DeepseekV2ForCausalLM, PreTrainedTokenizerFast]:
    """The trained model in bfloat16, ready to be saved, and its tokenizer. The recipe's seed fixes everything."""
    tokenizer = train_tokenizer(documents(recipe.seed, "train", TOKENIZER_DOCUMENTS))
    torch.manual_seed(recipe.seed)
    model = DeepseekV2ForCausalLM(pocket_config()).float()
    rng = random.Random(f"batches:{recipe.seed}")
    rows = batches(documents(recipe.seed, "train", DOCUMENTS), tokenizer, recipe, rng)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not progress) as bars:
        bar = bars.add_task("pocket", total=recipe.steps)
        for step in train(model, rows, recipe):
            losses = f"loss {step.loss:.2f}, silenced {step.loss_silenced:.2f}, on <bos> {step.sink:.2f}"
            bars.update(bar, advance=1, description=losses)
            if progress and not stderr.is_terminal and step.number % 100 == 0:
                note(f"step {step.number}: {losses}")
    strengthen(model)
    return model.to(torch.bfloat16), tokenizer


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.build", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the new checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--verify", type=Path, nargs="?", const=checkpoint_dir(), help="measure this checkpoint instead"
    )
    parser.add_argument("--data", action="store_true", help="write the shipped data files again instead")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if [options.out is not None, options.verify is not None, options.data].count(True) != 1:
        parser.error("give one of --out DIR, to build, --verify [DIR], to measure, and --data")
    if options.data:
        ship(data_dir())
        return 0
    folder: Path = options.out or options.verify
    if options.out is not None:
        begin = time.monotonic()
        with new_folder(folder, "pocket") as temporary:
            model, tokenizer = build(Recipe(steps=options.steps, seed=options.seed), progress=not options.quiet)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / "measured.json", measure(model.float(), tokenizer))
            write_manifest(temporary, "pocket", {}, ["model.safetensors"], time.monotonic() - begin)
        print(f"built in {time.monotonic() - begin:.0f} s on {torch.get_num_threads()} threads: {folder}")
        measured = read_json(folder / "measured.json", "the new checkpoint")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        measured = measure(model, tokenizer)
    complaints = check(measured, read_json(checkpoint_dir() / "measured.json", "the shipped checkpoint"))
    for name, value in measured.items():
        print(f"{name}: {value}")
    for complaint in complaints:
        print(f"differs: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
