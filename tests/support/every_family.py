"""A tiny model of every family of transformers with swappable experts, its sizes set by the names of its settings.

`families.FAMILIES` has families with a configuration that tests rely on; these need only be small.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tests.support.families import FAMILIES, MORE_FAMILIES, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "moe_hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "max_position_embeddings": 128,
    "model_max_length": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_block_size": 8,
    "index_kpool": 4,
    "rotary_dim": 8,
    "sliding_window": 64,
    "sliding_window_size": 64,
    "d_rel": 4,
    "rel_extent": 64,
    "gated_norm_rank": 4,
    "router_hidden_size": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "hc_lowrank": 8,
    "n_layers_per_attn_res_block": 2,
    "hidden_size_per_layer_input": 0,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}
"""Settings by name; a family takes those that it has."""

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LATENT = {"num_key_value_heads": 4}  # as many keys as queries, in latent attention

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip

TEXT: dict[str, dict[str, Any]] = {
    "aria_text": {},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, **_HYBRID},
    "beam": {},
    "cohere2_moe": {},
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots3_note_text": {**_LATENT, "head_dim": 16, "per_layer_config": {}},
    "flint": {},
    "glm_moe_dsa": _LATENT,
    "granitemoe_swa": {},
    "granitemoehybrid": _HYBRID,
    "hy_v3": {},
    "hy_v4": _LATENT,
    "inkling_text": {},
    "inkling2_text": {},
    "kimi_linear": {**_LATENT, **_HYBRID},
    "kolibri1": {},
    "laguna": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m3_vl_text": {},
    "qwen3_5_moe_text": {},
    "qwen4_exp_text": _INDEXER,
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
    "mistral4": {**_LATENT, "head_dim": 16},
}
"""Language models, beside those in `families`; what they set otherwise."""


_OTHER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4,
    "num_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "image_size": 16, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "moe_intermediate_size": 16, "num_local_experts": 4,
    "projection_intermediate_size": 32, "position_embedding_size": 64, "text_hidden_size": 32, "n_layers": 1,
    "posemb_grid_size": 4, "projection_hidden_dim": 32, "adapter_in_dim": 32, "adapter_out_dim": 32, "pos_emb_width": 4,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32, "output_dim": 32,
    "downsample_hidden_size": 16, "feature_size": 16, "num_mel_bins": 16, "adapter_input_size": 32, "decoder_dim": 32,
    "hidden_sizes": [8], "depths": [1], "patch_sizes": [2], "mlp_dim": 48, "output_channels": 16, "num_experts": 4,
    "window_size": 4, "global_attn_indexes": [0], "vocab_size": 64, "thinker_hidden_size": 32, "codebook_size": 16,
    "text_config_hidden_size": 32, "per_layer_config": {},
}  # fmt: skip
"""Settings by name of the parts for pictures and sound."""

_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
WRAPPED: dict[str, dict[str, Any]] = {
    "aria": {},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma": {"per_layer_config": {}},
    "dots3_note": {"head_dim": 16, "per_layer_config": {}},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 16], "rope_parameters": _SECTIONS},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": _SECTIONS},
    "glm5_next": {"qk_rope_head_dim": 0, "head_dim": 0},
    "inkling_mm_model": {},
    "inkling2": {},
    "minimax_m3_vl": {},
    "mistral_large4": {},
    "muse_spark": {},
    "qwen3_5_moe": {},
    "qwen3_omni_moe_thinker": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}},
    "qwen3_vl_moe": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}},
    "qwen4_exp": _INDEXER,
    "unlimited_ocr": {"num_key_value_heads": 4},
}
"""Bigger models around a language model; what its settings are otherwise."""


def every_config(family: str) -> Any:
    """The tiny configuration of any family here or in `families`."""
    if family in WRAPPED:
        return type(whole := AutoConfig.for_model(family))(**_small(whole, WRAPPED[family]))
    if family in TEXT:
        known = AutoConfig.for_model(family).to_dict()
        sizes = {key: value for key, value in SIZES.items() if key in known}
        return AutoConfig.for_model(family, **sizes | TOKENS | TEXT[family])
    return AutoConfig.for_model(family, **(FAMILIES | MORE_FAMILIES)[family])


def _small(settings: Any, text: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Small sizes for a configuration and for the parts that it has, `text` for the language model's."""
    known = settings.to_dict()
    latent = _LATENT if "kv_lora_rank" in known else {}
    sizes = {**SIZES, **TOKENS, **latent, **text} if name == "text_config" else _OTHER if name else {}
    own = {key: value for key, value in sizes.items() if key in known or (name == "text_config" and key in text)}
    parts = {part: getattr(settings, part, None) for part in type(settings).sub_configs}
    return own | {part: _small(value, text, part) for part, value in parts.items() if value is not None}
