"""Small models of the causal-LM families of transformers, with random weights, by the fields of their configs.

The weights of matrices are eight times as large as at initialization, so that greedy decoding does not repeat a token.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GROUPED = {**EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], **HEADS}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    **HEADS,
    "num_key_value_heads": 4,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"], **HEADS}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **MIXED,
}
SHARED = {"shared_expert_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
STATE = {"n_groups": 2, "chunk_size": 8, **HEADS}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0, **SLIDING}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8, **HEADS},
    "ministral": SLIDING,
    "ministral3": HEADS,
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, **SHARED, "decoder_sparse_step": 1},
    "qwen3": HEADS,
    "qwen3_moe": {**EXPERTS, **HEADS},
    "qwen3_next": {**EXPERTS, **SHARED, **LINEAR},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**EXPERTS, **SHARED, **LINEAR},
    "gemma": HEADS,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": {**PER_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**PER_LAYER, "global_head_dim": 8},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "olmo_hybrid": LINEAR,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4},
    "gpt_neox": {},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_oss": {**SLIDING, **EXPERTS},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, **HEADS},
    "falcon_mamba": {"state_size": 8},
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "cohere": {},
    "cohere2": SLIDING,
    "stablelm": {},
    "starcoder2": {},
    "deepseek_v2": {**LATENT, **GROUPED},
    "deepseek_v3": {**LATENT, **GROUPED},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**GROUPED, **HEADS},
    "smollm3": {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0]},
    "exaone4": SLIDING,
    "nemotron": {},
    "nemotron_h": {
        **EXPERTS,
        **STATE,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "layers_block_type": ["mamba", "attention"],
    },
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba": {"state_size": 8},
    "mamba2": {**STATE, "state_size": 8, "num_heads": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "adapter_rank": 4,
    },
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
        **HEADS,
    },
    "rwkv": {"attention_hidden_size": 32},
    "minimax": {**EXPERTS, **MIXED, "block_size": 8},
    "minimax_m2": {**EXPERTS, **HEADS},
    "llama4_text": {**EXPERTS, **HEADS, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**EXPERTS, **HEADS, "moe_topk": 2},
    "ernie4_5": HEADS,
    "ernie4_5_moe": {**EXPERTS, **HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "bitnet": {},
    "seed_oss": HEADS,
    "nanochat": {},
    "apertus": {},
    "arcee": {},
    "afmoe": {**EXPERTS, **SLIDING},
    "dots1": {**GROUPED, **HEADS},
    "exaone": {},
    "helium": HEADS,
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "longcat_flash": {**LATENT, **GROUPED},
    "persimmon": {},
    "codegen": {**GPT, "rotary_dim": 4},
}


def family(kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of a family."""
    return small_model(kind, SIZES | FAMILIES[kind], seed)


def small_model(kind: str, fields: dict[str, Any], seed: int) -> PreTrainedModel:
    """Return a model of an architecture, with these config fields and large random weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.requires_grad_(False).eval()
