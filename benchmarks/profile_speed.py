"""Time of a profile against a plain forward pass of the same tokens, side by side.

    python benchmarks/profile_speed.py

For each shape: a random model in bfloat16, the same sequences and batch for all. "plain" is `model(input_ids)` with the
fastest of the stock experts implementations; the three are measured in turn, and the medians of the ratios printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from superexperts.profile import profile_corpus

COMMON = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "use_cache": False,
}
SHAPES: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, num_key_value_heads=4, head_dim=64, moe_intermediate_size=384, num_experts=32, num_experts_per_tok=4
    ),
    "deepseek_v2": DeepseekV2Config(
        **COMMON, num_key_value_heads=16, intermediate_size=2816, moe_intermediate_size=384, n_routed_experts=32,
        num_experts_per_tok=4, n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=256,
        qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64, n_group=1, topk_group=1,
    ),
    "mixtral": MixtralConfig(
        **COMMON, num_key_value_heads=4, intermediate_size=1536, num_local_experts=8, num_experts_per_tok=2
    ),
}  # fmt: skip
BACKENDS = ("eager", "grouped_mm", "batched_mm")


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure(name: str, config: PretrainedConfig, rounds: int, batch: int, length: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids_BL = torch.randint(3, config.vocab_size, (batch, length))

    def plain(backend: str) -> float:
        model.set_experts_implementation(backend)
        return seconds(lambda: model(ids_BL, use_cache=False))

    plain("grouped_mm")  # warm-up
    fastest = min(BACKENDS if batch * length <= 256 else BACKENDS[:2], key=lambda name: min(plain(name), plain(name)))
    ratios: dict[float, list[float]] = {0.75: [], 1.0: []}
    for _ in range(rounds):
        base = plain(fastest)
        for depth, found in ratios.items():
            found.append(
                seconds(lambda depth=depth: profile_corpus(model, ids_BL, batch_size=batch, depth=depth)) / base
            )
    told = ", ".join(f"depth {depth}: {statistics.median(found):.2f}x" for depth, found in ratios.items())
    tokens = batch * length / base
    print(f"{name}: {told} of plain ({fastest}, {tokens:,.0f} tokens a second, median of {rounds})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.batch} x {options.length} tokens")
    for name, config in SHAPES.items():
        measure(name, config, options.rounds, options.batch, options.length)


if __name__ == "__main__":
    main()
