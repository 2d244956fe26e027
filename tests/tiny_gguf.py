"""A tiny Llama with random weights of 32 bits, as a file of llama.cpp's that transformers reads
too: what both compute of it is equal to many digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, HEADS, INNER, LAYERS = 64, 4, 96, 2


def save_tiny_gguf(file: Path, tokenizer_of: Path, *, first_token: bool) -> Path:
    """Make and save the model.

    Args:
        tokenizer_of: a GGUF file of a real model, whose tokenizer it gets.
        first_token: whether a text begins with a token of the model's own.
    """
    import gguf  # installed by `make servers` alone

    real, writer = gguf.GGUFReader(tokenizer_of), gguf.GGUFWriter(file, "llama")
    for name, field in real.fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.ggml.add_bos_token":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_add_bos_token(first_token)
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    words = len(real.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(words)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        drawn = rng.normal(0, 0.15, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", drawn.astype(np.float32))

    add("token_embd", words, WIDTH)
    add("output_norm", WIDTH)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}", WIDTH)
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{matrix}", WIDTH, WIDTH)
        for matrix in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{matrix}", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
