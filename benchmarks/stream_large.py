"""Time and memory of `profile --stream` and `profile --quick` on a checkpoint larger than memory, side by side with the
time to read the bytes that they need and the time of the matrix products alone.

    python benchmarks/stream_large.py --folder DIR

Makes, in DIR, a checkpoint of DeepSeek-V2-Lite's shape (27 layers, 15.7 B parameters in bfloat16, 31 GB, Hub-style
shards with a key for each expert) with random weights and two planted experts, written as a stream; it is kept for the
next run. Files are dropped from the page cache before each reading.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV2Config

from superexperts.checkpoint import INDEX, Checkpoint
from superexperts.pocket import checkpoint_dir

PLANTED = {(3, 17): 2000.0, (8, 40): 1000.0}
"""Expert -> by how much its down_proj is larger."""
LENGTH = 512
"""Tokens of a sequence."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of DeepSeek-V2-Lite (deepseek-ai/DeepSeek-V2-Lite, config.json)."""

    layers: int
    vocabulary: int = 102400
    hidden: int = 2048
    dense: int = 10944
    expert: int = 1408
    experts: int = 64
    top: int = 6
    shared: int = 2
    heads: int = 16
    nope: int = 128
    rope: int = 64
    value: int = 128
    latent: int = 512

    def config(self) -> DeepseekV2Config:
        return DeepseekV2Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, intermediate_size=self.dense,
            moe_intermediate_size=self.expert, n_routed_experts=self.experts, num_experts_per_tok=self.top,
            n_shared_experts=self.shared, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=self.latent,
            qk_nope_head_dim=self.nope, qk_rope_head_dim=self.rope, v_head_dim=self.value, n_group=1, topk_group=1,
            topk_method="greedy", tie_word_embeddings=False, dtype="bfloat16",
        )  # fmt: skip

    def mlp(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"gate_proj": (width, self.hidden), "up_proj": (width, self.hidden), "down_proj": (self.hidden, width)}

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's tensors by their names on the Hub."""
        query = self.heads * (self.nope + self.rope)
        tensors: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.kv_a_proj_with_mqa": (self.latent + self.rope, self.hidden),
            "self_attn.kv_a_layernorm": (self.latent,),
            "self_attn.kv_b_proj": (self.heads * (self.nope + self.value), self.latent),
            "self_attn.o_proj": (self.hidden, self.heads * self.value),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        if number == 0:
            tensors |= {f"mlp.{name}": shape for name, shape in self.mlp(self.dense).items()}
        else:
            tensors |= {"mlp.gate": (self.experts, self.hidden)}
            tensors |= {
                f"mlp.shared_experts.{name}": shape for name, shape in self.mlp(self.expert * self.shared).items()
            }
            for expert in range(self.experts):
                tensors |= {f"mlp.experts.{expert}.{name}": shape for name, shape in self.mlp(self.expert).items()}
        return {f"model.layers.{number}.{name}.weight": size for name, size in tensors.items()}


def tensors_of(
    shapes: dict[str, tuple[int, ...]], pool: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Random tensors, each from another place of a pool of random numbers."""
    for key, shape in shapes.items():
        if len(shape) == 1:
            yield key, torch.ones(shape, dtype=torch.bfloat16)
            continue
        count = shape[0] * shape[1]
        start = int(torch.randint(0, len(pool) - count, (1,), generator=generator))
        tensor = pool[start : start + count].view(shape)
        for (layer, expert), factor in PLANTED.items():
            if key == f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight":
                tensor = tensor * factor
        yield key, tensor.clone()


def make(folder: Path, shape: Shape) -> None:
    """Writes the checkpoint, a shard for each layer."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**28, generator=generator) * 0.02).to(torch.bfloat16)
    ends = {"lm_head.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    shards = [
        {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)},
        *map(shape.layer, range(shape.layers)),
        ends,
    ]
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(tensors_of(shapes, pool, generator)), temporary / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
        print(f"\rwriting {name}", end="", flush=True)
    print()
    (temporary / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shape.config().save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        if (checkpoint_dir() / name).is_file():
            shutil.copy(checkpoint_dir() / name, temporary)
    os.sync()
    temporary.rename(folder)


def forget(folder: Path) -> None:
    """Drops the checkpoint from the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def needed(key: str, layers: int) -> bool:
    """Whether a profile of the first layers needs the tensor."""
    return key == "model.embed_tokens.weight" or any(key.startswith(f"model.layers.{n}.") for n in range(layers))


def reading(folder: Path, layers: int, wanted: int | None = None) -> tuple[float, int]:
    """Seconds to read the needed tensors (up to `wanted` bytes) into one buffer, one after the other as they lie in the
    files; bytes."""
    forget(folder)
    with Checkpoint(folder) as checkpoint:
        entries = [entry for key, entry in checkpoint.items() if needed(key, layers)]
    buffer = memoryview(bytearray(max(entry.nbytes for entry in entries)))
    opened = {entry.file: os.open(folder / entry.file, os.O_RDONLY) for entry in entries}
    done = 0
    begin = time.perf_counter()
    for entry in entries:
        if wanted is None or done < wanted:
            done += os.preadv(opened[entry.file], [buffer[: entry.nbytes]], entry.offset)
    seconds = time.perf_counter() - begin
    for descriptor in opened.values():
        os.close(descriptor)
    return seconds, done


@torch.inference_mode()
def products(shape: Shape, layers: int, tokens: int, length: int) -> float:
    """Seconds of the matrix products of the first layers on so many tokens in sequences of `length`, weights in memory,
    an expert's tokens being an even share; the scores and sums of the attention count. Measured on one layer of each
    kind."""
    seconds = {}
    for number in (0, 1):
        total = _timed_attention(shape, tokens // length, length)
        for key, size in shape.layer(number).items():
            if len(size) == 1:
                continue
            rows = tokens * shape.top // shape.experts if ".experts." in key else tokens
            x, weight = torch.randn(rows, size[1], dtype=torch.bfloat16), torch.randn(size, dtype=torch.bfloat16)
            F.linear(x[:8], weight)
            start = time.perf_counter()
            F.linear(x, weight)
            total += time.perf_counter() - start
        seconds[number] = total
    return seconds[0] + (layers - 1) * seconds[1]


def _timed_attention(shape: Shape, sequences: int, length: int) -> float:
    query, value = (
        torch.randn(sequences * shape.heads, length, width, dtype=torch.bfloat16)
        for width in (shape.nope + shape.rope, shape.value)
    )
    scores = torch.bmm(query, query.transpose(1, 2))  # also gets the products' code ready
    start = time.perf_counter()
    torch.bmm(torch.bmm(query, query.transpose(1, 2), out=scores), value)
    return time.perf_counter() - start


def profile(folder: Path, out: Path, *options: str) -> tuple[float, float, list[tuple[int, int]], str]:
    """Runs the command in a process of its own: seconds, peak GiB resident, super experts, what it said."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "superexperts", "profile", str(folder), "--json", f"--out={out}", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        said, errors = child.communicate()
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise SystemExit(errors)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    (corpus,) = json.loads(said)["corpora"].values()
    return seconds, peak, [tuple(key) for key in corpus["super"]], errors.strip()


def startup() -> float:
    """Seconds until the command has imported what it needs, which no checkpoint can change."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import superexperts.profile, transformers.models.deepseek_v2.modeling_deepseek_v2"],
        check=True,
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is or shall be")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    shape, folder = Shape(layers=arguments.layers), arguments.folder
    size = (
        2 * sum(torch.Size(s).numel() for n in range(shape.layers) for s in shape.layer(n).values())
        + 4 * shape.vocabulary * shape.hidden
    )
    if not folder.is_dir():
        free = shutil.disk_usage(folder.absolute().parent).free
        if free < 1.1 * size:
            raise SystemExit(f"skipped: the checkpoint has {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        make(folder, shape)
    layers = round(0.75 * shape.layers)
    print(f"{shape.layers} layers, {size / 1e9:.1f} GB; {layers} are profiled; {torch.get_num_threads()} threads")
    start = startup()
    print(f"starting Python with its imports takes {start:.1f} s, which is taken off the times below")

    quick, peak, found, said = profile(folder, folder.parent / "quick", "--quick")
    read_bytes = round(float(said.rpartition("profile: ")[2].partition(" GB")[0]) * 1e9)
    read, done = reading(folder, layers, read_bytes)
    base = read * read_bytes / done
    print(
        f"quick: {quick - start:.1f} s, {(quick - start) / base:.2f}x of reading its {read_bytes / 1e9:.1f} GB "
        f"({base:.1f} s), "
        f"peak {peak:.2f} GiB; found {found}, planted {sorted(PLANTED)}"
    )
    streamed, peak, found, _ = profile(
        folder, folder.parent / "streamed", "--stream", f"--tokens={arguments.tokens}", f"--seq-len={LENGTH}"
    )
    multiplied = products(shape, layers, arguments.tokens, LENGTH)
    read, done = reading(folder, layers)
    print(
        f"stream: {streamed - start:.1f} s for {arguments.tokens} tokens, "
        f"{(streamed - start) / max(read, multiplied):.2f}x of the larger of reading {done / 1e9:.1f} GB "
        f"({read:.1f} s) and its matrix products ({multiplied:.1f} s), peak {peak:.2f} GiB; found {found}"
    )


if __name__ == "__main__":
    main()
