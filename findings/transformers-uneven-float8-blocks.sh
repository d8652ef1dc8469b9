#!/usr/bin/env bash
# A block-float8 checkpoint with matrices that the block size does not divide, dequantized by transformers.
#
# One would guess: scales are applied to the blocks that `weight_block_size` in config.json names (128 x 128), the last
#   block of a row or column being smaller, as DeepSeek-V3's own code does.
# What happens: the block size is taken from the shapes, rows / rows of scales. A matrix of 192 rows in blocks of 128 has
#   two rows of scales and is read in blocks of 96: rows 96 to 127 get the scale of the next block. Nothing is said. Where
#   the division leaves a remainder (the 576 rows of DeepSeek-V3's kv_a_proj_with_mqa), loading fails instead.
# Source: transformers/integrations/finegrained_fp8.py, Fp8Dequantize._dequantize_one (5.23.0).
# What superexperts does: it reads float8 blocks itself, by the size in config.json (checkpoints/float8.py).
#
# Run by hand: findings/transformers-uneven-float8-blocks.sh    (exit code 1 if the behaviour has changed)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6

cat >"$work/uneven.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 128
folder = Path(sys.argv[1])


def saved(width: int) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of that width with float8 blocks of 128 x 128 in down_proj; returns what its weights stand for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=width,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / str(width))
    file = folder / str(width) / "model.safetensors"
    tensors, meant = load_file(file), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        weight[:BLOCK] *= 100  # so that the first rows of blocks have other scales than the last
        scales = torch.empty([-(-size // BLOCK) for size in weight.shape])
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        meant[name] = torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                scales[i, j] = weight[part].abs().max() / 448
                stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[name][part] = stored[part].float() * scales[i, j]
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scales
    save_file(tensors, file, {"format": "pt"})
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / str(width))
    return meant


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
seen = {}
for width in (256, 192):
    meant = saved(width)
    model = AutoModelForCausalLM.from_pretrained(
        folder / str(width), dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    read = model.state_dict()
    worst = max(float((read[name].float() - value).abs().max() / value.abs().max()) for name, value in meant.items())
    print(f"width {width}, blocks of {BLOCK}: largest difference {worst:.2g} of the largest weight")
    seen[width] = worst
print("unchanged" if seen[256] < 0.01 < 0.1 < seen[192] else "changed")
sys.exit(0 if seen[256] < 0.01 < 0.1 < seen[192] else 1)
PYTHON
"$work/venv/bin/python" "$work/uneven.py" "$work/checkpoints" 2>"$work/log" || { tail -5 "$work/log"; exit 1; }
