"""A small random Llama and a tokenizer of bytes, written as a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import LlamaConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny_models import TINY, random_model

Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
SPECIAL = ["<s>", "</s>"]
MERGES = {"d e": "de", "r e": "re"}
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def tiny_llama() -> PreTrainedModel:
    """Its weights are what Q8_0 gives back, so that a file of that type holds it exactly."""
    model = random_model(LlamaConfig(**TINY | {"vocab_size": len(_tokens()), "tie_word_embeddings": False}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(quantize(weight.numpy(), Q8_0), Q8_0)))
    return model


def write_gguf(
    path: Path, model: PreTrainedModel, architecture: str = "llama", kind: Any = F32, without: str = "", **more: Any
) -> Path:
    """Write a GGUF file. kind: type of its matrices. without: a tensor to leave out. more: values by their names."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_tokens())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in _tokens()])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    for name, value in more.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, weights in _tensors(model).items():
        if name == without:
            continue
        if weights.ndim == 2 and kind != F32:
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokens() -> list[str]:
    return [*SPECIAL, *bytes_to_unicode().values(), *MERGES.values()]


def _tensors(model: PreTrainedModel) -> Mapping[str, np.ndarray[Any, Any]]:
    config: Any = model.config
    found = {}
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        for heads, kind in (config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj"):
            if kind in name:  # llama.cpp has the two halves that RoPE turns beside each other
                halves = array.reshape(heads, 2, config.head_dim // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = array
    return found
