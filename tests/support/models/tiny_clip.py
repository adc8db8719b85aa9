"""A tiny CLIP with random weights: a folder of transformers with its tokenizer, or of open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from loading import scattered

WORDS = ("a", "photo", "of", "cat", "dog", "red", "house")


def transformers_clip(folder: Path) -> Any:
    """Writes and returns a model, with its tokenizer: images of 32 pixels, 12 channels."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformer = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**transformer, "hidden_size": 16, "image_size": 32, "patch_size": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(WORDS) + 1}
    text = {
        **transformer,
        **special,
        "hidden_size": 8,
        "vocab_size": len(WORDS) + 2,
        "max_position_embeddings": 8,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = scattered(transformers.CLIPModel(config)).eval()
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(("[PAD]", *WORDS, "[EOS]"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[EOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary["[EOS]"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[EOS]", model_max_length=8
    ).save_pretrained(folder)
    preprocessing = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model


def open_clip_model(folder: Path) -> Any:
    """Writes a model in open_clip's form; returns it."""
    import open_clip

    tower = {"layers": 1, "width": 16, "heads": 2}
    config = {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "layers": 1,
            "width": 16,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **tower},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    model = scattered(open_clip.CLIP(**config)).eval()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model
