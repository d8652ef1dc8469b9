"""Time and memory of `profile --stream` and `profile --quick` on a checkpoint larger than memory, over two lower
bounds: the time to read the bytes that they need, and the time of the matrix products alone.

    python benchmarks/stream_large.py --folder DIR

Makes, in DIR, a checkpoint of DeepSeek-V2-Lite's shape (27 layers, 15.7 B parameters in bfloat16, 31 GB, Hub-style
shards with a key for each expert) with random weights and two planted experts, and keeps it for the next run. Files are
dropped from the page cache before each reading.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from large_checkpoint import PLANTED, Shape, forget, made, size_of
from watching import resident, watched

from superexperts.checkpoints.reader import Checkpoint

LENGTH = 512
"""Tokens of a sequence."""
SAMPLE = 8 * 10**9
"""Bytes that are read to measure the speed of the disk."""


def needed(key: str, layers: int) -> bool:
    """Whether a profile of the first layers needs the tensor."""
    return key == "model.embed_tokens.weight" or any(key.startswith(f"model.layers.{n}.") for n in range(layers))


def reading(folder: Path, layers: int, limit: int | None = None) -> tuple[float, int]:
    """Seconds to read the needed tensors (until `limit` bytes) into one buffer in file order, and the bytes read."""
    forget(folder)
    with Checkpoint(folder) as checkpoint:
        entries = [entry for key, entry in checkpoint.items() if needed(key, layers)]
    buffer = memoryview(bytearray(max(entry.nbytes for entry in entries)))
    opened = {file: os.open(folder / file, os.O_RDONLY) for file in {entry.file for entry in entries}}
    done = 0
    begin = time.perf_counter()
    for entry in entries:
        if limit is None or done < limit:
            done += os.preadv(opened[entry.file], [buffer[: entry.nbytes]], entry.offset)
    seconds = time.perf_counter() - begin
    for descriptor in opened.values():
        os.close(descriptor)
    return seconds, done


@torch.inference_mode()
def products(shape: Shape, layers: int, tokens: int, length: int) -> float:
    """Seconds of the matrix products of the first layers, with the weights in memory.

    Takes `tokens` tokens in sequences of `length`, spread evenly over the experts, and includes the products of
    attention (scores and weighted sums). All layers with experts use the same weights: one layer is larger than any
    cache, so none of it is still cached when the next layer begins."""
    total = 0.0
    for number, times in ((0, 1), (1, layers - 1)):
        matrices = []
        for key, size in shape.layer(number).items():
            if len(size) == 2:
                rows = tokens * shape.top // shape.experts if ".experts." in key else tokens
                matrices.append((rows, torch.randn(size, dtype=torch.bfloat16)))
        inputs = {(rows, weight.shape[1]) for rows, weight in matrices}
        of = {place: torch.randn(place, dtype=torch.bfloat16) for place in inputs}
        for turn in range(times + 1):
            seconds = _timed_attention(shape, tokens // length, length)
            for rows, weight in matrices:
                x = of[rows, weight.shape[1]]
                start = time.perf_counter()
                F.linear(x, weight)
                seconds += time.perf_counter() - start
            total += seconds if turn else 0.0  # the first turn generates oneDNN's code; it does not count
    return total


def _timed_attention(shape: Shape, sequences: int, length: int) -> float:
    query, value = (
        torch.randn(sequences * shape.heads, length, width, dtype=torch.bfloat16)
        for width in (shape.nope + shape.rope, shape.value)
    )
    scores = torch.bmm(query, query.transpose(1, 2))
    start = time.perf_counter()
    torch.bmm(torch.bmm(query, query.transpose(1, 2), out=scores), value)
    return time.perf_counter() - start


def profile(folder: Path, out: Path, *options: str) -> tuple[float, float, list[tuple[int, int]], str]:
    """Runs the command in a separate process: seconds, peak GiB resident, super experts, standard error."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    ran = watched(
        [sys.executable, "-m", "superexperts", "profile", str(folder), "--json", f"--out={out}", *options],
        lambda process: resident("VmHWM", process),
    )
    (corpus,) = json.loads(ran.output)["corpora"].values()
    return ran.seconds, ran.peak / 2**30, [tuple(key) for key in corpus["super"]], ran.errors.strip()


def startup() -> float:
    """Seconds until the command has imported what it needs, which does not depend on the checkpoint."""
    begin = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-c",
            # As the command imports them.
            "import gc; gc.disable(); import superexperts.cli, superexperts.profiling.profile, "
            "transformers.models.deepseek_v2.modeling_deepseek_v2; gc.freeze()",
        ],
        check=True,
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the checkpoint; made if missing")
    parser.add_argument("--layers", type=int, default=27, help="layers of the checkpoint")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shape, folder = Shape(layers=arguments.layers), arguments.folder
    made(folder, shape)
    layers = round(0.75 * shape.layers)
    size = size_of(shape) / 1e9
    print(f"{shape.layers} layers, {size:.1f} GB; {layers} are profiled; {torch.get_num_threads()} threads")
    print(f"planted: {sorted(PLANTED)}; times are without the start of Python and its imports")
    # The speed of a shared machine changes from minute to minute, so every round measures the bounds again.
    for tokens in (None, *arguments.tokens):
        options = ["--quick"] if tokens is None else ["--stream", f"--tokens={tokens}", f"--seq-len={LENGTH}"]
        rounds = [_round(shape, folder, layers, tokens, options) for _ in range(arguments.rounds)]
        for number, row in enumerate(rounds, start=1):
            print(f"{' '.join(options)}, round {number}: {row}")
        print(
            f"{options[0]}: {median(row.seconds for row in rounds):.1f} s, {median(row.ratio for row in rounds):.2f}x, "
            f"peak {max(row.peak for row in rounds):.2f} GiB (medians, highest)"
        )


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of the command, and the bounds measured before and after it."""

    seconds: float
    read: float
    """Seconds that reading the same bytes takes."""
    multiplied: float
    """Seconds of the matrix products."""
    peak: float
    found: list[tuple[int, int]]

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.read, self.multiplied)

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.ratio:.2f}x of the larger of reading ({self.read:.1f} s) and products "
            f"({self.multiplied:.1f} s), peak {self.peak:.2f} GiB, found {self.found}"
        )


def _round(shape: Shape, folder: Path, layers: int, tokens: int | None, options: list[str]) -> Round:
    def bounds() -> tuple[float, float]:
        read, done = reading(folder, layers, SAMPLE)
        return read / done, products(shape, layers, tokens, LENGTH) if tokens else 0.0

    before, start = bounds(), startup()
    seconds, peak, found, errors = profile(folder, folder.parent / "profile", *options)
    pace, multiplied = (fmean(pair) for pair in zip(before, bounds(), strict=True))
    read_bytes = float(re.findall(r"(\S+) GB", errors)[-1]) * 1e9
    return Round(seconds - start, pace * read_bytes, multiplied, peak, found)


if __name__ == "__main__":
    main()
