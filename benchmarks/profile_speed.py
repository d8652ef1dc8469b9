"""Time and memory of a profile over those of a plain forward pass of the same tokens.

    python benchmarks/profile_speed.py
    python benchmarks/profile_speed.py --device cuda --shapes deepseek_v2_lite --batch 16 --length 1024

For each shape: a random model in bfloat16, and the same batch of sequences for a plain pass and for profiles at two
depths. "plain" is `model(input_ids)` with the fastest stock experts implementation. The three are measured in turn; the
script prints the medians of the ratios. Each round has new sequences, as each batch of a corpus has: on a CPU every new
number of tokens at an expert costs time. Memory is what a pass needs beyond the weights: on a GPU as torch counts it,
on a CPU the peak of resident memory, each measured in a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
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
    PreTrainedModel,
    Qwen3MoeConfig,
)
from watching import forget_peak, resident

from superexperts.profiling.measure import profile_corpus

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
    "deepseek_v2_lite": DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, n_group=1, topk_group=1, topk_method="greedy",
    ),
}  # fmt: skip
BACKENDS = ("eager", "grouped_mm", "batched_mm")
DEPTHS = (0.75, 1.0)
GIB = 2**30


def made(name: str, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16).eval()


def tokens(name: str, options: argparse.Namespace) -> torch.Tensor:
    return torch.randint(3, SHAPES[name].vocab_size, (options.batch, options.length), device=options.device)


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.inference_mode()
def measure(name: str, options: argparse.Namespace) -> str:
    """Prints the times; returns the fastest stock implementation."""
    model, ids_BL = made(name, options.device), tokens(name, options)

    def plain(backend: str) -> float:  # of the sequences of the moment
        model.set_experts_implementation(backend)
        return seconds(lambda: model(ids_BL, use_cache=False))

    plain("grouped_mm")  # warm-up
    # batched_mm copies an expert's weights for each token
    backends = BACKENDS if ids_BL.numel() <= 256 else BACKENDS[:2]
    fastest = min(backends, key=lambda name: min(plain(name), plain(name)))
    ratios: dict[float, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(options.rounds):
        ids_BL = tokens(name, options)
        base = plain(fastest)
        for depth, found in ratios.items():
            found.append(
                seconds(
                    lambda depth=depth, ids_BL=ids_BL: profile_corpus(
                        model, ids_BL, batch_size=options.batch, depth=depth
                    )
                )
                / base
            )
    ratios_text = ", ".join(f"depth {depth}: {statistics.median(found):.2f}x" for depth, found in ratios.items())
    speed = ids_BL.numel() / base
    print(
        f"{name}: {ratios_text} of plain ({fastest}, {speed:,.0f} tokens a second, median of {options.rounds})",
        flush=True,
    )
    return fastest


def memory(name: str, backend: str, depth: float | None, options: argparse.Namespace) -> None:
    """Prints how many GiB a pass needs beyond the weights; `depth` None is a plain pass."""
    model, ids_BL = made(name, options.device), tokens(name, options)
    model.set_experts_implementation(backend)
    cuda = options.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    with torch.inference_mode():
        if depth is None:
            model(ids_BL, use_cache=False)
        else:
            profile_corpus(model, ids_BL, batch_size=options.batch, depth=depth)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    kind = "plain" if depth is None else f"profile at depth {depth}"
    print(f"  {kind}: {(peak - before) / GIB:.2f} GiB besides {before / GIB:.2f} GiB of weights", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3_moe", "deepseek_v2", "mixtral"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.batch} x {options.length} tokens")
    context = multiprocessing.get_context("spawn")
    for name in options.shapes:
        fastest = measure(name, options)
        for depth in (None, *DEPTHS):
            child = context.Process(target=memory, args=(name, fastest, depth, options))
            child.start()
            child.join()


if __name__ == "__main__":
    main()
