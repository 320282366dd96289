"""Tiny models of every supported family, created when needed: real architectures, random weights."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mlprune.models.source import ModelSource, find_model
from tests.tiny import tokenizer

VOCABULARY = 384
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
ODD: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4, "n_head": 4},
    "gemma": {"num_key_value_heads": 4},
    "gemma2": {"sliding_window": 16, "layer_types": HALF_SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "layer_types": HALF_SLIDING, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 48},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
}


def config(family: str, **changes: Any) -> PretrainedConfig:
    configuration: PretrainedConfig = AutoConfig.for_model(family, **{**COMMON, **ODD.get(family, {}), **changes})
    return configuration


@functools.cache
def source(family: str = "llama", dtype: str = "float32") -> ModelSource:
    """Return a saved checkpoint of the family, with the test tokenizer. Its weights are the same every time."""
    folder = Path(tempfile.mkdtemp(prefix=f"mlprune-{family}-"))
    return save(config(family), folder, dtype)


def save(configuration: PretrainedConfig, folder: Path, dtype: str = "float32") -> ModelSource:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration)
    for parameter in model.parameters():  # larger than the usual initial values, so that logits differ
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return find_model(str(folder))
