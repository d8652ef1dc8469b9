"""Tiny random models of many MoE families: the smallest configurations that keep what makes each family different."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # a dense first layer, shared experts, latent attention without and with a latent query
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 16, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    # no shared expert
    "qwen3_moe": {
        **_COMMON,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
    },
    # a shared expert with a gate, biases on q, k, v
    "qwen2_moe": {
        **_COMMON,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "mixtral": {**_COMMON, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_COMMON, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    # biases, transposed weights, gate and up interleaved, a clamped activation
    "gpt_oss": {**_COMMON, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": {
        **_COMMON,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "phimoe": {**_COMMON, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_COMMON, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    # no gate: the experts are plain MLPs; layers without attention, layers without an MLP
    "nemotron_h": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


_SPARSE: dict[str, Any] = {
    **_COMMON, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "head_dim": 8,
}  # fmt: skip
_GROUPED: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_FULL = {"layer_types": ["full_attention"] * 3}

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "dots1": {**_SPARSE, **_GROUPED, "n_routed_experts": 8, "n_shared_experts": 1},
    "ernie4_5_moe": {
        **_SPARSE,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "moe_layer_end_index": -1,
    },
    "hunyuan_v1_moe": {**_COMMON, "intermediate_size": 24, "num_experts": 8, "moe_topk": 3, "head_dim": 8},
    "minimax_m2": {**_SPARSE, "intermediate_size": 24, "num_local_experts": 8, "rotary_dim": 8},
    # layers of convolutions, of state spaces and of linear attention between those of attention
    "lfm2_moe": {
        **_SPARSE,
        "num_experts": 8,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv", "full_attention"],
    },
    "jamba": {
        **_COMMON,
        "intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "qwen3_next": {
        **_SPARSE,
        "num_experts": 8,
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "flex_olmo": {**_COMMON, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "afmoe": {**_SPARSE, **_FULL, "num_experts": 8, "num_shared_experts": 1, "num_dense_layers": 1},
    "exaone_moe": {**_SPARSE, **_GROUPED, **_FULL, "num_experts": 8, "num_shared_experts": 1},
    "glm4_moe_lite": {**_DEEPSEEK, "q_lora_rank": 16},
    # the shared expert stands beside the block of the routed ones
    "granitemoeshared": {
        **_COMMON,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 40,
    },
    # the layer itself is the block, its dense MLP the shared expert
    "gemma4_text": {
        **_SPARSE,
        **_FULL,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "hidden_size_per_layer_input": 0,
    },
    "deepseek_v32": {**_DEEPSEEK, "q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
}
"""Families that only the profile is tested on; doge is left out, because its experts are rows of embeddings."""


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> nn.Module:
    """A model of the family in evaluation mode, every weight and bias drawn anew (normal, deviation 0.2; around 1
    where a family starts at 1), so that no zero bias or unit norm can hide a mistake. `settings` replace the family's
    own in its configuration."""
    config = AutoConfig.for_model(family, **{**(FAMILIES | MORE_FAMILIES)[family], **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.2
                tensor.copy_(noise + 1 if bool((tensor == 1).all()) else noise)
    return model.eval().to(dtype)


def tiny_tokens(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] of the families' vocabulary, BOS first."""
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 1
    return tokens
