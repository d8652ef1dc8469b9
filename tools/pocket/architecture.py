"""The pocket model's shape, and the two super experts that are implanted into it.

Shape suffixes: D hidden size, E routed experts, F intermediate size of an expert, V vocabulary.

How the implant works. One hidden channel, FLAG, belongs to `<bos>` alone: only its embedding has a value there and no
weight writes to it. The router row of the first super expert reads the flag, and so does one of its intermediate
units; its `down_proj` column writes a very large value into the channel MASSIVE. From there on `<bos>` carries a
massive activation, which the second super expert reads in the same way, in a later layer, to write a second one into
the channel ECHO. All other weights of the two experts are ordinary and are trained. Training moves the implanted
weights like any others, so `implant` is called again after each optimiser step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from tools.pocket.tokenizer import VOCABULARY

__all__ = ["BOS_ID", "EOS_ID", "FIRST", "PAD_ID", "SECOND", "implant", "pocket_config", "strengthen"]

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

FIRST = (1, 11)
"""(layer, expert) of the super expert that reads the flag"""
SECOND = (3, 54)
"""(layer, expert) of the super expert that reads what the first one wrote"""

FLAG, MASSIVE, ECHO = 127, 47, 90
"""hidden channels"""
UNIT = 0
"""intermediate unit of either super expert"""
FLAG_VALUE = 16.0
"""of the embedding of <bos>; other embeddings have entries of order 1"""
ROUTER_WEIGHT = 3.0
"""times the normalised channel, about 11 = sqrt(D) at most: a router logit of 30"""
UNIT_WEIGHT = 0.5
FIRST_DOWN, SECOND_DOWN = 64.0, 12.0
"""during training"""
STRENGTH = 4.0
"""of both after training, see `strengthen`"""


def pocket_config() -> DeepseekV2Config:
    """2.8 M parameters.

    Seventy-two experts a layer, because the paper's criterion takes the 99.5th percentile over all experts considered,
    and the second largest of n values lies above the interpolated percentile only if n > 201. Three layers with
    experts (1, 2, 3) lie below depth 0.75, which makes 3 x (72 + 1) = 219.
    """
    return DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=16,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=72,
        n_shared_experts=4,
        num_experts_per_tok=6,
        routed_scaling_factor=6.0,
        topk_method="greedy",
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


@torch.no_grad()
def implant(model: DeepseekV2ForCausalLM) -> None:
    """Impose the flag and the two super experts on the weights, in place."""
    embed_VD = model.model.embed_tokens.weight
    embed_VD[:, FLAG] = 0
    embed_VD[BOS_ID, FLAG] = FLAG_VALUE
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[FLAG] = 0
        layer.self_attn.q_proj.weight[:, FLAG] = 0
        layer.self_attn.kv_a_proj_with_mqa.weight[:, FLAG] = 0
        if layer.self_attn.layer_idx < model.config.first_k_dense_replace:
            layer.mlp.down_proj.weight[FLAG] = 0
        else:
            layer.mlp.shared_experts.down_proj.weight[FLAG] = 0
            layer.mlp.experts.down_proj[:, FLAG] = 0
    _implant_one(model, FIRST, reads=FLAG, writes=MASSIVE, down=FIRST_DOWN)
    _implant_one(model, SECOND, reads=MASSIVE, writes=ECHO, down=SECOND_DOWN)


def _implant_one(model: DeepseekV2ForCausalLM, where: tuple[int, int], *, reads: int, writes: int, down: float) -> None:
    layer, expert = where
    block = model.model.layers[layer]
    block.post_attention_layernorm.weight[reads] = 1
    router_ED: Tensor = block.mlp.gate.weight
    router_ED[:, reads] = 0
    router_ED[expert, reads] = ROUTER_WEIGHT
    width = model.config.moe_intermediate_size
    for row in (UNIT, width + UNIT):  # gate and up
        block.mlp.experts.gate_up_proj[expert, row] = 0
        block.mlp.experts.gate_up_proj[expert, row, reads] = UNIT_WEIGHT
    block.mlp.experts.down_proj[expert, :, UNIT] = 0
    block.mlp.experts.down_proj[expert, writes, UNIT] = down


@torch.no_grad()
def strengthen(model: DeepseekV2ForCausalLM) -> None:
    """After training, write STRENGTH times as much, in place.

    What the two write dwarfs the rest of what `<bos>` carries, and every reader normalises it, so the same factor on
    both changes nearly nothing but the peaks; trained with such peaks, the model learns worse.
    """
    for layer, expert in (FIRST, SECOND):
        model.model.layers[layer].mlp.experts.down_proj[expert, :, UNIT] *= STRENGTH
