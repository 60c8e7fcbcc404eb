"""Models to measure on: a tiny random one, a 0.5-1.5B random one of the Qwen class, and a tokenizer that goes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 211,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
# The shapes of Qwen2.5-0.5B and 1.5B; weights are random, since only time and memory are measured.
QWEN = {
    "qwen-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


def make_tiny(folder: Path, seed: int = 0) -> Path:
    """Writes a random two-layer Llama in Hugging Face layout, with a tokenizer, and returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    return _save(model, TINY["vocab_size"], folder)


def make_qwen(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes a random Qwen2 of the named size in bfloat16, and returns `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {**QWEN[name], "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    config = Qwen2Config(**shape, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    return _save(model, 1000, folder)


def vocabulary_of(path: str) -> int:
    """How many token ids may be drawn: those that the tokenizer can decode, since TRL decodes every completion."""
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(path))


def _save(model: Any, tokens: int, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, tokens)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return folder
