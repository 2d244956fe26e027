"""A tiny CLIP and its tokenizer, with random weights, built from their configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

QUESTIONS = ["what is this", "who uses this", "what is this made of and why is it so", "what"]


def tiny_tokenizer(folder: Path, texts: Sequence[str] = QUESTIONS) -> int:
    """Save a tokenizer that knows the words of these texts; returns how many tokens it has."""
    words = sorted({word for text in texts for word in text.split()})
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=8,
    ).save_pretrained(folder)
    return len(vocab)


def tiny_clip(folder: Path, texts: Sequence[str] = QUESTIONS) -> Path:
    """Save a CLIP of six dimensions; returns the folder."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tokens = max(40, tiny_tokenizer(folder, texts))
    text = {**small, "num_attention_heads": 2, "vocab_size": tokens, "max_position_embeddings": 8}
    vision = {**small, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(
        CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=6)
    ).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
