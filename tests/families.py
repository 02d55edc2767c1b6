"""Small models of many architectures, with weights so large that greedy decoding does not repeat one token."""

from benchmarks.families import small_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
STATE = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
DECODE = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {"n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "gemma2": ALTERNATING,
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, **ALTERNATING},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8, "head_dim": 8, "intermediate_size_mlp": 64},
}
LINEAR = {f"linear_{name}": size for name, size in {"num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 8}.items()}
MIXED = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
# Decoded by `StatefulDecoder`: several tokens per call, and (the last two) one.
STATEFUL = {
    "mamba2": STATE,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "head_dim": 8},
    "qwen3_5_text": {"linear_num_value_heads": 4, **LINEAR, **MIXED},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba": {"state_size": 8},
}
REFUSED = {
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "minimax": {"num_local_experts": 2, "block_size": 8, **MIXED},
}


def family(kind, seed=0, **fields):
    """Return a model of this architecture with random weights."""
    return small_model(kind, SIZES | (DECODE | STATEFUL | REFUSED).get(kind, {}) | fields, seed)
