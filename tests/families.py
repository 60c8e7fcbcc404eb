"""Tiny random models of every family that the installed transformers has a causal LM for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What any of the families' configurations may call its sizes; each gets those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
    "sliding_window": 64,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [],
    "moe_layer_start_index": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # older names
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "n_inner": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "rotary_dim": 8,
    # state spaces
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "state_size": 16,
    "num_mem_blocks": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 258,
}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8},
    "cwm": {"bos_token_id": 0},
    "deepseek_v3": {"head_dim": 8, "topk_method": "noaux_tc"},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "intermediate_size": [96, 96],
    },
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 96, "moe_layers": [1]},
    "longcat_flash": {
        "head_dim": 8,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 1,
        "num_layers": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "youtu": {"head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **sizes: Any) -> Any:
    """The configuration of a tiny model of this type; `sizes` come before what is usual here."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = set(getattr(kind, "__annotations__", {})) | set(kind().to_dict())
    aliases = getattr(kind, "attribute_map", {})
    values = {k: v for k, v in _SIZES.items() if (k in known or k in aliases) and aliases.get(k) not in _SIZES}
    return kind(**{**values, **_OWN.get(family, {}), **sizes})


def save_tiny(family: str, folder: Path, **sizes: Any) -> None:
    """Saves a tiny random model of a family, in float32; nothing in it is zero or one, as much is in an untrained one."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **sizes), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder)
