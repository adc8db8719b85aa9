from __future__ import annotations

import json

import pytest

from fd_large.backbones.transformers.kinds import KINDS, fields_of, kind_of
from fd_large.errors import WeightsError


def test_every_kind_is_a_model_of_transformers(transformers):
    for name, kind in KINDS.items():
        config = getattr(transformers, kind.config)
        assert config.model_type in (name, f"{name}_vision_model")
        assert getattr(transformers, kind.model).config_class is config


def test_only_plain_fields_of_the_model_are_taken(transformers):
    config = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "quantization_config": {"quant_method": "x"},
        "of_tomorrow": 3,
    }
    text, others = fields_of("dinov2", config, "test")
    assert json.loads(text) == {"hidden_size": 32}
    assert "of_tomorrow" in others


def test_unknown_types_name_the_nearest():
    with pytest.raises(WeightsError, match="dinov2"):
        kind_of("dinov2s", "test")
