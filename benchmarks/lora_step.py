"""A training step of LoRA on chosen experts, over those of the frozen model and of PEFT's `target_parameters`.

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --device cuda --layers 27 --vocabulary 102400 --adapt 2 3 --batch 16 --length 1024 \\
        --accumulation 16 --attention

Four layers of DeepSeek-V2-Lite's shape (hidden 2048, 64 experts of 1408, top 6, two shared), random weights; LoRA of
rank 16 on one expert in each of the last two layers. "frozen" is forward and backward of the model without an adapter,
with its gradient ending where ours ends: at the output of the lowest adapted layer's experts. All take turns on one
model; `--attention` adds LoRA on the attention of all layers. Prints the medians of each round's ratios, and by how
much peak memory exceeds that of the frozen step. On a CPU, seconds are processor time, which other programs disturb
less than wall time, and memory is resident memory; on a GPU, seconds are wall time, and memory is as torch counts it.
The second command is the whole model, with the batch of the published training in 16 parts.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import watching
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV2Config

from superexperts.adapters import lora
from superexperts.adapters.files import WEIGHTS_FILE
from superexperts.core.types import ExpertKey
from superexperts.models.banks import find_banks
from superexperts.models.experts import BankCall
from superexperts.models.hooks import tapped
from superexperts.training.loop import whole_tensors

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
R = 16


def build(layers: int, vocabulary: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of the shape. Every weight repeats one block of normal numbers, since drawing all would take long."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            DeepseekV2Config(**SHAPE | {"vocab_size": vocabulary}, num_hidden_layers=layers, use_cache=False),
            dtype=dtype,
        )
    model.to_empty(device=device)
    rotary = model.get_submodule("model.rotary_emb")
    rotary.__init__(rotary.config)  # its buffers are not in the checkpoint, so `to_empty` left them without values
    rotary.to(device)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1 if "norm" in name else 0)
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                end = min(start + block.numel(), flat.numel())
                flat[start:end] = block.roll(start // block.numel())[: end - start]
    return model.requires_grad_(False)


def median_experts(model: nn.Module, ids_BL: Tensor, layers: list[int]) -> list[ExpertKey]:
    """The expert of each layer that has the median number of tokens."""
    counts: dict[int, list[int]] = {}

    def tap(call: BankCall) -> None:
        if call.experts != ("shared",):
            counts[call.layer] = torch.bincount(call.expert_R, minlength=len(call.experts)).tolist()

    with torch.no_grad(), tapped(model, tap):
        model(input_ids=ids_BL)
    return [(layer, sorted(range(64), key=counts[layer].__getitem__)[32]) for layer in layers]


@contextlib.contextmanager
def frozen(model: nn.Module, chosen: list[ExpertKey]) -> Iterator[nn.Module]:
    path = next(bank.path for bank in find_banks(model) if bank.layer == min(layer for layer, _ in chosen))
    hook = model.get_submodule(path).register_forward_hook(lambda _, __, output: output.requires_grad_())
    yield model
    hook.remove()


@contextlib.contextmanager
def ours(model: nn.Module, chosen: list[ExpertKey]) -> Iterator[nn.Module]:
    yield lora.attach_experts(model, chosen, r=R, alpha=32, dropout=0.0, seed=0)
    lora.detach(model)


@contextlib.contextmanager
def peft(model: nn.Module, chosen: list[ExpertKey]) -> Iterator[nn.Module]:
    layers = {layer for layer, _ in chosen}
    names = [
        f"{bank.path}.{name}"
        for bank in find_banks(model)
        if bank.layer in layers
        for name in ("gate_up_proj", "down_proj")
    ]
    with lora.quiet():
        yield get_peft_model(model, LoraConfig(r=R, lora_alpha=32, target_modules=[], target_parameters=names))
    lora.detach(model)


@contextlib.contextmanager
def attention(model: nn.Module, _: list[ExpertKey]) -> Iterator[nn.Module]:
    yield lora.attach_attention(model, r=R, alpha=32, dropout=0.0, seed=0)
    lora.detach(model)


def step(model: nn.Module, ids_BL: Tensor, accumulation: int, trained: bool) -> Callable[[], None]:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if trained else None

    def run() -> None:
        for part_BL in ids_BL.chunk(accumulation):
            (model(input_ids=part_BL, labels=part_BL, use_cache=False).loss / accumulation).backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def peak_mib(device: str) -> float:
    """Peak memory since `forget_peak`, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return watching.resident("VmHWM") / 2**20


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        watching.forget_peak()


def now(device: str) -> float:
    """Wall time in seconds once the GPU has finished; on a CPU, processor time."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--experts", default="grouped_mm", choices=("grouped_mm", "eager"), help="stock implementation")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--adapt", type=int, nargs="+", help="layers with LoRA on one expert; default: the last two")
    parser.add_argument("--accumulation", type=int, default=1, help="parts into which the batch is split")
    parser.add_argument("--attention", action="store_true", help="also measure LoRA on attention")
    parser.add_argument("--without-peft", action="store_true", help="leave PEFT out")
    options = parser.parse_args()
    device = options.device
    model = build(options.layers, options.vocabulary, getattr(torch, options.dtype), device)
    model.set_experts_implementation(options.experts)
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(3, options.vocabulary, (options.batch, options.length), generator=generator).to(device)
    part_BL = ids_BL.chunk(options.accumulation)[0]
    chosen = median_experts(model, part_BL, options.adapt or [options.layers - 2, options.layers - 1])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, {options.dtype}, {options.experts}, "
        f"{options.layers} layers, {options.batch} x {options.length} tokens in {options.accumulation} parts, "
        f"LoRA on {chosen}",
        flush=True,
    )
    ways: dict[str, Any] = {"frozen": frozen, "ours": ours} | ({} if options.without_peft else {"peft": peft})
    ways |= {"attention": attention} if options.attention else {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    trainable: dict[str, int] = {}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            with way(model, chosen) as adapted:
                run = step(adapted, ids_BL, options.accumulation, name != "frozen")
                forget_peak(device)
                begin = now(device)
                run()
                if number:  # the first round warms up
                    seconds[name].append(now(device) - begin)
                    peaks[name].append(peak_mib(device))
                trainable[name] = lora.trainable_parameters(adapted)
                if name == "ours" and not number:
                    values = {name: tensor.to(model.dtype) for name, tensor in whole_tensors(adapted).items()}
                    with tempfile.TemporaryDirectory() as folder:  # as `train` saves it, in the weights' precision
                        adapted.save_pretrained(folder, state_dict=values, save_embedding_layers=False)
                        size = (Path(folder) / WEIGHTS_FILE).stat().st_size
            model.zero_grad()

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    for name in ways:
        median, peak = statistics.median(seconds[name]), statistics.median(peaks[name])
        extra = peak - statistics.median(peaks["frozen"])
        print(
            f"{name}: {median:.3f} s a step ({ids_BL.numel() / median:,.0f} tokens a second), "
            f"peak {peak:,.0f} MiB ({extra:+,.0f}), {trainable[name]:,} trainable"
        )
    print(f"ours / frozen: {ratio('ours', 'frozen'):.3f}x of {options.rounds} rounds: ", end="")
    print(" ".join(f"{x / y:.3f}" for x, y in zip(seconds["ours"], seconds["frozen"], strict=True)))
    print(f"adapter file: {size:,} bytes")
    if not options.without_peft:
        parameters = trainable["peft"] / trainable["ours"]
        print(f"peft / ours: {ratio('peft', 'ours'):.2f}x in time, {parameters:.1f}x in parameters")


if __name__ == "__main__":
    main()
