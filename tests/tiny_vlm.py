"""Tiny Qwen-VL models with random weights, tokenizer and image processor, saved to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from lever_train.rollout.answerers.processor_model import without_videos

END, PAD, IMAGE = "<|im_end|>", "<|endoftext|>", "<|image_pad|>"
SPECIAL = [PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>"]
CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = ["Question: Short answer: what is number red blue two a dog tennis yes pizza train"]


# What is particular to the vision tower of a family
_SIGHT = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
VISION: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "Qwen2_5_VL": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "patch_size": 14,
    },
    "Qwen3VL": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
        "patch_size": 16,
    },
}


def save_tiny_vlm(folder: Path, family: str = "Qwen2_5_VL", spread: float = 0.0) -> Path:
    """Make and save the model; the same weights every time. ``spread``: standard deviation of
    what is added to all of them, so that every branch of the model matters."""
    disable_progress_bar()
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    side = 2 * VISION[family]["patch_size"]
    images = Qwen2VLImageProcessorPil(
        min_pixels=side**2 * 4, max_pixels=side**2 * 12, patch_size=side // 2
    )
    images.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # so that texts differ
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 10000.0,
        },
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }
    if family == "Qwen3VL":
        text["head_dim"] = 16
    vision = _SIGHT | VISION[family]
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for weights in model.parameters():
        weights.data += spread * torch.randn_like(weights)
    model.generation_config.eos_token_id = [ids[END], ids[PAD]]
    model.generation_config.pad_token_id = ids[PAD]
    model.save_pretrained(folder)
    return folder


def tiny_tokenizer(special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT
    return tokenizer


_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2}
# Families whose own processor lays out a prompt: their special tokens, and what stands for an image
PROCESSED = {
    "Llava": (["<image>"], "<image>"),
    "Idefics3": (["<image>", "<fake_token_around_image>", "<global-img>"], "<image>"),
    "Gemma3": (["<image>", "<soi>", "<eoi>"], "<soi>"),
    "SmolVLM": (
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
        "<image>",
    ),
    "InternVL": (["<IMG_CONTEXT>", "<img>", "</img>", "<video>"], "<IMG_CONTEXT>"),
    "LlavaOnevision": (["<image>", "<video>"], "<image>"),
    "Qwen3_5": (SPECIAL[3:], "<|vision_start|><|image_pad|><|vision_end|>"),
    "PaliGemma": (["<image>", "<bos>"], "<image>"),
}


def save_tiny_processed(folder: Path, family: str) -> Path:
    """Make and save such a model with its processor, weights large enough for texts to differ."""
    disable_progress_bar()
    special, shown = PROCESSED[family]
    tokenizer = tiny_tokenizer([PAD, END, *special])
    tokenizer.chat_template = CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", shown)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, END, *special)}
    text: dict[str, Any] = _SIZES | {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    text |= {"eos_token_id": ids[END], "pad_token_id": ids[PAD], "bos_token_id": None}
    make = {
        "Llava": _llava,
        "Idefics3": _idefics3,
        "Gemma3": _gemma3,
        "SmolVLM": _smolvlm,
        "InternVL": _internvl,
        "LlavaOnevision": _llava_onevision,
        "Qwen3_5": _qwen3_5,
        "PaliGemma": _paligemma,
    }[family]
    config, processor = make(tokenizer, text, ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for weights in model.parameters():
        weights.data += 0.1 * torch.randn_like(weights)
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _llava(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sight = transformers.CLIPVisionConfig(**_SIZES, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(
        vision_config=sight,
        text_config=transformers.LlamaConfig(**text),
        image_token_id=ids["<image>"],
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _idefics3(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    config = transformers.Idefics3Config(
        vision_config=_SIZES | {"image_size": 56, "patch_size": 14},
        text_config=transformers.LlamaConfig(**text),
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=ids[PAD],
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    chat = tokenizer.chat_template
    return config, transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=chat
    )


def _gemma3(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {"image_token": "<image>", "boi_token": "<soi>", "eoi_token": "<eoi>"}
    chat = tokenizer.chat_template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=named,
    )
    config = transformers.Gemma3Config(
        vision_config=_SIZES | {"image_size": 56, "patch_size": 14},
        text_config=text
        | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        image_token_id=ids["<image>"],
        boi_token_id=ids["<soi>"],
        eoi_token_id=ids["<eoi>"],
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return config, transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=chat
    )


def _smolvlm(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    config = transformers.SmolVLMConfig(
        vision_config=_SIZES | {"image_size": 56, "patch_size": 14},
        text_config={"model_type": "llama"} | text,
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=ids[PAD],
    )
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    # its own processor wants num2words; of images it says the same
    return config, transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )


def _named(tokenizer: Any, **named: str) -> Any:
    """The tokenizer with names for its special tokens, as a processor asks for them."""
    start = "<bos>" if "<bos>" in tokenizer.get_vocab() else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=start,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=named,
    )


def _internvl(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    config = transformers.InternVLConfig(
        vision_config=_SIZES | {"image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2"} | text,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=3
    )
    named = _named(
        tokenizer,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return config, without_videos(transformers.InternVLProcessor)(
        images, named, None, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _llava_onevision(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    sight = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    tiles = [[28, 28], [28, 56], [56, 28]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=_SIZES | sight | {"vision_use_head": False},
        text_config={"model_type": "qwen2"} | text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=tiles,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=tiles
    )
    return config, without_videos(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _qwen3_5(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    sight = _SIGHT | VISION["Qwen3VL"]
    del sight["deepstack_visual_indexes"]
    config = transformers.Qwen3_5Config(
        text_config=text
        | {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 0],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        vision_config=sight | {"out_hidden_size": 32},
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    images = Qwen2VLImageProcessorPil(min_pixels=32**2, max_pixels=32**2 * 6, patch_size=16)
    return config, without_videos(transformers.Qwen3VLProcessor)(
        images, tokenizer, None, chat_template=tokenizer.chat_template
    )


def _paligemma(tokenizer: Any, text: dict[str, Any], ids: dict[str, int]) -> tuple[Any, Any]:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    sight = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    named = _named(tokenizer, image_token="<image>")
    processor = transformers.PaliGemmaProcessor(images, named)
    config = transformers.PaliGemmaConfig(
        vision_config=_SIZES | sight | {"vision_use_head": False},
        # the processor adds tokens of its own
        text_config={"model_type": "gemma"} | text | {"vocab_size": len(processor.tokenizer)},
        image_token_index=ids["<image>"],
        projection_dim=32,
    )
    return config, processor
