"""Surgery on a large checkpoint against the kernel's own tools, and against loading the model.

    python benchmarks/checkpoint_io.py --folder DIR

Makes, in DIR, a checkpoint of DeepSeek-V2-Lite's shape (`large_checkpoint.py`; 7 layers by default, 8 GB) and keeps it
for the next run; beside it needs as much again and two shards. In each round, one after the other: `cp` of the shards
that hold two experts, the same with `sync`, `prune`, `restore`, `export --format merged`, `cmp` and `compare` of two
copies; once: the model loaded with transformers, zeroed and saved. Times of commands are without the start of Python
and its imports, which no checkpoint can change, and with it. Memory is what is resident and no page of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch
from large_checkpoint import Shape, made, size_of

from superexperts.bank import DOWN, GATE, UP
from superexperts.config import CheckpointConfig
from superexperts.factors import Factor, Place, own_layout, save_layout
from superexperts.model import load_structure

ORIGINAL = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for expert in sys.argv[3].split(","):
    layer, number = map(int, expert[1:].split("E"))
    model.model.layers[layer].mlp.experts.down_proj.data[number] = 0
model.save_pretrained(sys.argv[2])
"""
COMMAND = """
import sys, time
import torch, superexperts.cli, transformers.models.deepseek_v2.modeling_deepseek_v2
import superexperts.compare, superexperts.export, superexperts.prune, superexperts.restore
begin = time.perf_counter()
code = superexperts.cli.main(sys.argv[1:])
print(f"seconds {time.perf_counter() - begin}", file=sys.stderr)
sys.exit(code)
"""
"""The command, and how long it takes once everything is imported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of a command took."""

    seconds: float
    inside: float
    """Without the start of Python and its imports; the same for commands of others."""
    memory: float
    """The most MiB at a time that were no pages of a file."""


def watched(command: list[str]) -> Run:
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                peak = max(peak, memory.rss - memory.shared)
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        said = child.stderr.read() if child.stderr else ""
        if child.returncode:
            raise SystemExit(said)
    inside = [float(line.partition(" ")[2]) for line in said.splitlines() if line.startswith("seconds ")]
    return Run(seconds=seconds, inside=inside[0] if inside else seconds, memory=peak / 2**20)


def superexperts(*arguments: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, *arguments]


def write_adapter(folder: Path, base: Path, experts: tuple[tuple[int, int], ...]) -> None:
    """LoRA of rank 16 on the experts."""
    model = load_structure(CheckpointConfig(model=str(base)))
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
    save_layout(folder, *own_layout(model, factors), base=str(base), revision=None)


def new_bytes(folder: Path) -> int:
    """Bytes of shards that are no second name of others."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.stat().st_nlink == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is or shall be")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where results are written and removed; default: beside the folder")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="compare two copies")
    parser.add_argument("--original", action=argparse.BooleanOptionalAction, default=True, help="load the model")
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
    if arguments.compare:
        shutil.copytree(base, work / "copy")
    runs: dict[str, list[Run]] = defaultdict(list)
    written: dict[str, int] = {}

    def measure(name: str, command: list[str], result: str | None = None) -> None:
        runs[name].append(watched(command))
        if result is not None:
            written[name] = new_bytes(work / result)

    for _ in range(arguments.rounds):
        for name in ("cp", "cp-sync", "pruned", "restored", "merged"):
            shutil.rmtree(work / name, ignore_errors=True)
        for file in held:  # all into the page cache
            file.read_bytes()
        for name, then in (("cp", ""), ("cp-sync", f" && sync {work / 'cp-sync'}/*")):
            (work / name).mkdir()
            copied = f"cp --reflink=never {' '.join(map(str, held))} {work / name}"
            measure(name, ["sh", "-c", copied + then], name)
            shutil.rmtree(work / name)
        measure("prune", superexperts("prune", str(base), f"--experts={names}", f"--out={work / 'pruned'}"), "pruned")
        measure("restore", superexperts("restore", str(work / "pruned"), f"--out={work / 'restored'}"), "restored")
        measure("merged", superexperts("export", str(work / "adapter"), "--format=merged", f"--out={work / 'merged'}"),
                "merged")  # fmt: skip
        shutil.rmtree(work / "pruned")
        shutil.rmtree(work / "merged")
        if arguments.compare:
            pairs = " && ".join(f"cmp {file} {work / 'copy' / file.name}" for file in shards)
            measure("cmp", ["sh", "-c", pairs])
            measure("compare", superexperts("compare", str(base), str(work / "copy"), "--expect-identical"))
    if arguments.compare:
        shutil.rmtree(work / "copy")
    if arguments.original:
        needed = 1.5 * size_of(shape)
        if psutil.virtual_memory().available < needed:
            print(f"the model is not loaded: that takes {needed / 2**30:.0f} GiB, which are not free")
        else:
            measure("original", [sys.executable, "-c", ORIGINAL, str(base), str(work / "original"), names])
    report(runs, written, size_of(shape))
    shutil.rmtree(work)


def report(runs: dict[str, list[Run]], written: dict[str, int], size: int) -> None:
    """The fastest of the rounds, since others may use the machine; all of them in brackets."""
    best = {name: min(run.inside for run in some) for name, some in runs.items()}
    memory = {name: statistics.median(run.memory for run in some) for name, some in runs.items()}
    for name, some in runs.items():
        told = f"{name:9} {best[name]:6.2f} s (" + ", ".join(f"{run.inside:.2f}" for run in some) + ")"
        whole = min(run.seconds for run in some)
        told += f"; {whole:.2f} s with the start of Python" if whole != best[name] else ""
        told += f"; {memory[name]:.0f} MiB" if name not in ("cp", "cp-sync", "cmp") else ""
        print(told + (f"; {written[name] / 1e9:.2f} GB written" if name in written else ""))
    print(f"prune: {best['prune'] / best['cp']:.2f}x of cp, {best['prune'] / best['cp-sync']:.2f}x of cp and sync")
    if "compare" in best:
        speeds = [size / 1e9 / best[name] for name in ("compare", "cmp")]
        ratio = speeds[0] / speeds[1]
        print(f"compare: {speeds[0]:.2f} GB/s of each side, cmp {speeds[1]:.2f}: {ratio:.2f}x")
    if "original" in best:
        whole = min(run.seconds for run in runs["prune"])
        saved = memory["original"] / memory["prune"]
        print(f"against loading: {best['original'] / whole:.1f}x faster with the start, {saved:.0f}x less memory")


if __name__ == "__main__":
    main()
