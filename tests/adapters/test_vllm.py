"""The `vllm` export through the loader of a real vLLM: what it stacks is what the file says. `make test-vllm`.

vLLM pins other versions of our dependencies, so it runs in a separate venv; SUPEREXPERTS_VLLM names its Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from superexperts.adapters import export, lora
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.layer import ExpertLoraConfig
from superexperts.models.banks import find_banks
from tests.adapters.test_export import save_adapter, save_base, stock
from tests.adapters.test_lora import randomise
from tests.support.families import tiny_model

VLLM = os.environ.get("SUPEREXPERTS_VLLM")
pytestmark = pytest.mark.skipif(VLLM is None, reason="SUPEREXPERTS_VLLM names no Python with vLLM: make test-vllm")

RANK, ALPHA = 8, 24
# Heads and widths that vLLM's kernels for the CPU take.
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32},
    "deepseek_v2": {
        "hidden_size": 64, "moe_intermediate_size": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32,
    },
}  # fmt: skip
SCRIPT = f"""
import sys
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest
model, adapter, out = sys.argv[1:]
llm = LLM(model=model, enable_lora=True, max_lora_rank={RANK}, max_loras=1, dtype="float32", enforce_eager=True,
          max_model_len=64, skip_tokenizer_init=True)
assert llm.llm_engine.add_lora(LoRARequest("adapter", 1, adapter))
manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
stacked = {{}}
for name, weights in manager.get_adapter(1).loras.items():
    for number, (a, b) in enumerate(zip(weights.lora_a, weights.lora_b, strict=True)):
        stacked |= {{f"{{name}}.{{number}}.A": a.contiguous(), f"{{name}}.{{number}}.B": b.contiguous()}}
save_file(stacked, out)
"""


@pytest.mark.parametrize("family", WIDE)
def test_vllm_stacks_what_the_file_says(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_export.tiny_model", lambda name, dtype: tiny_model(name, dtype, **WIDE[name]))
    base = save_base(tmp_path / "base", family)
    model = stock(base)
    banks = find_banks(model)
    chosen = {bank.path: (0, 3) for bank in (banks[0], banks[-1])}
    config = ExpertLoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(chosen), experts=chosen, task_type="CAUSAL_LM"
    )
    with lora.quiet():
        adapted = get_peft_model(model, config)
    randomise(adapted)
    adapter = save_adapter(adapted.eval(), base, tmp_path / "adapter")
    export.run(ExportConfig(adapter=adapter, format="vllm", out=tmp_path / "vllm"))
    engine = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [shutil.which(str(VLLM)) or str(VLLM), "-c", SCRIPT, str(base), str(tmp_path / "vllm"), str(tmp_path / "out")],
        env={**os.environ, **engine, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stacked = load_file(tmp_path / "out")
    written = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in stacked} == set(chosen)
    seen = 0
    for path in chosen:
        for expert in range(banks[0].num_experts):
            # vLLM's order is that of Mixtral's w1, w2 and w3.
            for number, projection in enumerate(("gate_proj", "down_proj", "up_proj")):
                key = f"base_model.model.{path}.{expert}.{projection}.lora_"
                ours = written[f"{key}B.weight"] @ written[f"{key}A.weight"] * (ALPHA / RANK)
                theirs = stacked[f"{path}.{number}.B"][expert] @ stacked[f"{path}.{number}.A"][expert]
                torch.testing.assert_close(theirs, ours)
                assert bool(ours.any()) == (expert in (0, 3))
                seen += 1
    assert seen == 2 * 3 * banks[0].num_experts
