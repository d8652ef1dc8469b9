"""A checkpoint of DeepSeek-V2-Lite's shape for the other benchmarks: random bfloat16 weights and two planted experts.

The shards are like those on the Hub, with a key for each expert. They are written one at a time, so that a checkpoint
may be larger than memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV2Config

from superexperts.checkpoints.reader import INDEX
from superexperts.pocket import checkpoint_dir

PLANTED = {(3, 17): 2000.0, (8, 40): 1000.0}
"""(layer, expert) -> factor on its down_proj, which makes it a super expert."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a DeepSeek-V2 model; the defaults are DeepSeek-V2-Lite's (deepseek-ai/DeepSeek-V2-Lite, config.json)."""

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
        """Shapes of a layer's tensors, by their names on the Hub."""
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
    """Random tensors in bfloat16, each copied from a random position of a pool of random numbers: drawing each
    one would take most of the time. Vectors are ones."""
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
    """Writes the checkpoint with one shard for each layer, under a temporary name until it is complete."""
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
    index = {"metadata": {"total_size": size_of(shape)}, "weight_map": weight_map}
    (temporary / INDEX).write_text(json.dumps(index))
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


def size_of(shape: Shape) -> int:
    """Bytes of the checkpoint's weights."""
    layers = sum(torch.Size(size).numel() for n in range(shape.layers) for size in shape.layer(n).values())
    return 2 * layers + 4 * shape.vocabulary * shape.hidden


def made(folder: Path, shape: Shape) -> None:
    """Writes the checkpoint unless it exists; `SystemExit` where the disk has no room for it."""
    if folder.is_dir():
        return
    size, free = size_of(shape), shutil.disk_usage(folder.absolute().parent).free
    if free < 1.1 * size:
        raise SystemExit(f"skipped: the checkpoint needs {size / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
    make(folder, shape)
