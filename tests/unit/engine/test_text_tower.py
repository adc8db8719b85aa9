"""Class names through a text tower: what transformers and open_clip themselves say."""

from __future__ import annotations

import pytest
import tiny_clip
import torch
import torch.nn.functional as F

from fd_large.engine.text_tower import check_prompts, classes_of, probabilities
from fd_large.errors import ConfigError, WeightsError

NAMES, PROMPTS = ("cat", "dog", "red house"), ("a photo of a {}.", "red {}")


def test_classes_of_open_clip(tmp_path):
    import open_clip

    model = tiny_clip.open_clip_model(tmp_path / "clip")
    found = classes_of(str(tmp_path / "clip"), NAMES, PROMPTS)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with torch.no_grad():
        texts = [prompt.format(name) for name in NAMES for prompt in PROMPTS]
        vectors = model.encode_text(tokenizer(texts), normalize=True).view(3, 2, -1)
    assert torch.allclose(found.vectors, F.normalize(vectors.mean(1), dim=-1), atol=1e-5)
    assert found.scale == pytest.approx(model.logit_scale.exp().item())


def test_mistakes(tmp_path):
    tiny_clip.transformers_clip(tmp_path)
    classes = classes_of(str(tmp_path), NAMES, PROMPTS)
    with pytest.raises(ConfigError, match=r"16 channels beside 12 .*layer embedding"):
        probabilities(torch.zeros(2, 16), classes)
    with pytest.raises(WeightsError, match="no text tower"):
        classes_of(str(tmp_path / "nowhere"), NAMES, PROMPTS)
    with pytest.raises(ConfigError, match="no list of class names"):
        check_prompts("cat", PROMPTS)
    with pytest.raises(ConfigError, match="no list of prompts"):
        check_prompts(NAMES, ("a photo",))
