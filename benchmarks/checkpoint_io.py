"""Time and memory of surgery on a large checkpoint over those of `cp`, of `cmp` and of loading the model.

    python benchmarks/checkpoint_io.py --folder DIR

Makes, in DIR, a checkpoint of DeepSeek-V2-Lite's shape (`large_checkpoint.py`; 7 layers by default, 8 GB) and keeps it
for the next run. The output needs as much space again, and that of two more shards.

Each round runs, in this process and in this order: `cp` of the shards that hold two experts, `cp` and `sync`, prune,
restore, export as merged; with `--compare` also `cmp` of two whole copies, and compare. Then whole commands run in
separate processes, start of Python included, in as many rounds; and once the original project's way: load the model
with transformers, zero the experts, save. Memory is resident memory without pages of files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from large_checkpoint import Shape, made, size_of
from watching import watched

from superexperts.adapters import export, files
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.factors import Factor, Place, own_layout
from superexperts.checkpoints.source import resolve
from superexperts.models.experts import DOWN, GATE, UP
from superexperts.models.loading import load_structure
from superexperts.surgery import compare, prune, restore
from superexperts.surgery.compare import CompareConfig
from superexperts.surgery.prune import PruneConfig
from superexperts.surgery.restore import RestoreConfig

ORIGINAL = """
import sys, time, torch
from transformers import AutoModelForCausalLM
import transformers.models.deepseek_v2.modeling_deepseek_v2
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for expert in sys.argv[3].split(","):
    layer, number = map(int, expert[1:].split("E"))
    model.model.layers[layer].mlp.experts.down_proj.data[number] = 0
model.save_pretrained(sys.argv[2])
print(f"loading: {time.perf_counter() - begin:.2f} s after the imports", file=sys.stderr)
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Runs a command: seconds, and the peak of its resident MiB without pages of files."""
    ran = watched(command, _private)
    for line in ran.errors.splitlines():
        if line.startswith("loading: "):
            print(line)
    return ran.seconds, ran.peak / 2**20


def _private(process: int) -> int:
    """Resident bytes of a process, without pages of files."""
    with contextlib.suppress(psutil.Error):  # the process has just ended
        memory = psutil.Process(process).memory_info()
        return int(memory.rss - memory.shared)
    return 0


def superexperts(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "superexperts", *arguments]


def write_adapter(folder: Path, base: Path, experts: tuple[tuple[int, int], ...]) -> None:
    """LoRA of rank 16 on the experts."""
    source = resolve(str(base))
    model = load_structure(source)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer, expert in experts:
        for name in (GATE, UP, DOWN):
            inputs, outputs = (1408, 2048) if name == DOWN else (2048, 1408)
            factors[Place(path=f"model.layers.{layer}.mlp.experts", expert=expert, projection=name)] = Factor(
                a_RI=torch.randn(16, inputs, generator=generator) * 0.02,
                b_OR=torch.randn(outputs, 16, generator=generator) * 0.02,
                scaling=2.0,
            )
    folder.mkdir(exist_ok=True)
    files.write_adapter(folder, *own_layout(model, factors), source)


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True)


def new_bytes(folder: Path) -> int:
    """Bytes of the shards that are not hard links to others."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.stat().st_nlink == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the checkpoint; made if missing")
    parser.add_argument("--layers", type=int, default=7, help="layers of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="folder for output, removed at the end; default: beside the checkpoint"
    )
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="compare two copies")
    parser.add_argument(
        "--original", action=argparse.BooleanOptionalAction, default=True, help="also load, zero and save the model"
    )
    arguments = parser.parse_args()
    base, work = arguments.folder, (arguments.work or arguments.folder.parent / "checkpoint-io").absolute()
    shape = Shape(layers=arguments.layers)
    made(base, shape)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    experts = ((1, 17), (shape.layers - 1, 40))
    names = ",".join(f"L{layer}E{expert}" for layer, expert in experts)
    write_adapter(work / "adapter", base, experts)
    shards = sorted(base.glob("*.safetensors"))
    held = [base / f"model-{layer + 2:05}-of-{len(shards):05}.safetensors" for layer, _ in experts]
    size = sum(file.stat().st_size for file in held)
    print(f"{size_of(shape) / 1e9:.1f} GB; two experts in {len(held)} shards of {size / 1e9:.2f} GB together")
    sources, copies = " ".join(map(str, held)), [work / "copy" / file.name for file in shards]
    compared = " && ".join(f"cmp {one} {other}" for one, other in zip(shards, copies, strict=True))
    if arguments.compare:
        shutil.copytree(base, work / "copy")
    pruning = PruneConfig(model=str(base), experts=names, out=work / "pruned")
    restoring = RestoreConfig(folder=pruning.out, out=work / "restored")
    merging = ExportConfig(adapter=work / "adapter", format="merged", out=work / "merged")
    comparing = CompareConfig(a=str(base), b=str(work / "copy"), expect_identical=True)
    times: dict[str, list[float]] = defaultdict(list)

    def measure(name: str, action: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        action()
        times[name].append(time.perf_counter() - begin)

    for _ in range(arguments.rounds):
        for file in held:  # fills the page cache
            file.read_bytes()
        for name, then in (("cp", ""), ("cp, sync", f" && sync {work / 'cp'}/*")):
            (work / "cp").mkdir()
            measure(name, lambda then=then: shell(f"cp --reflink=never {sources} {work / 'cp'}{then}"))
            shutil.rmtree(work / "cp")
            os.sync()
        measure("prune", lambda: prune.run(pruning))
        print(f"prune wrote {new_bytes(pruning.out) / 1e9:.2f} GB of shards; ", end="")
        measure("restore", lambda: restore.run(restoring))
        print(f"restore {new_bytes(restoring.out) / 1e9:.2f} GB; ", end="")
        measure("merged", lambda: export.run(merging))
        print(f"merged {new_bytes(merging.out) / 1e9:.2f} GB")
        for folder in (pruning.out, restoring.out, merging.out):
            shutil.rmtree(folder)
        os.sync()
        if arguments.compare:
            measure("cmp", lambda: shell(compared))
            measure("compare", lambda: compare.run(comparing))
    for name, values in times.items():
        print(
            f"{name:9} {min(values):6.2f} s, median {statistics.median(values):6.2f} s of",
            *(f"{v:.2f}" for v in values),
        )
    for statistic in (min, statistics.median):
        ratios = [f"{statistic(times['prune']) / statistic(times[name]):.2f}x of {name}" for name in ("cp", "cp, sync")]
        print(f"{statistic.__name__}: prune {' and '.join(ratios)}", end="")
        if arguments.compare:
            speeds = [size_of(shape) / 1e9 / statistic(times[name]) for name in ("compare", "cmp")]
            print(
                f"; compare {speeds[0]:.2f} GB/s of each side, cmp {speeds[1]:.2f}: {speeds[0] / speeds[1]:.2f}x",
                end="",
            )
        print()
    commands = {"prune": superexperts("prune", str(base), f"--experts={names}", f"--out={pruning.out}")}
    commands["restore"] = superexperts("restore", str(pruning.out), f"--out={restoring.out}")
    if arguments.compare:
        commands["compare"] = superexperts("compare", str(base), str(work / "copy"), "--expect-identical")
    every: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            every[name].append(timed(command))
        for folder in (pruning.out, restoring.out):
            shutil.rmtree(folder)
        os.sync()
    whole = {name: (statistics.median(t for t, _ in runs), max(m for _, m in runs)) for name, runs in every.items()}
    for name, runs in every.items():
        print(f"{name:9} as a whole command:", *(f"{seconds:.2f} s" for seconds, _ in runs))
    shutil.rmtree(work / "copy", ignore_errors=True)
    if arguments.original:
        needed = 1.5 * size_of(shape)
        if psutil.virtual_memory().available < needed:
            print(f"skipped loading the model: it needs {needed / 2**30:.0f} GiB of free memory")
        else:
            whole["original"] = timed([sys.executable, "-c", ORIGINAL, str(base), str(work / "original"), names])
    for name, (seconds, memory) in whole.items():
        print(f"{name:9} {seconds:6.2f} s with the start of Python (median), {memory:6.0f} MiB (highest)")
    if "original" in whole:
        faster, smaller = (whole["original"][i] / whole["prune"][i] for i in range(2))
        print(f"prune against loading the model: {faster:.1f}x faster, {smaller:.0f}x less memory")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
