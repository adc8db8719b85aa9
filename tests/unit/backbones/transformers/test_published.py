from __future__ import annotations

import json

import pytest
import torch
from loading import HF_VIT, close, loaded, scattered
from safetensors.torch import load_file, save_file

NAMES = [  # transformers 4's and 5's in memory, beside those that both store.
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
]


@pytest.mark.parametrize("kind", ["Model", "ForImageClassification"])
def test_names_of_any_release_and_of_models_with_a_head(transformers, kind, tmp_path):
    fields = {key: value for key, value in HF_VIT.items() if key != "intermediate_size"}
    theirs = scattered(getattr(transformers, f"Dinov2{kind}")(transformers.Dinov2Config(**fields)))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = getattr(theirs, "dinov2", theirs)
    with torch.no_grad():
        expected = whole(images).last_hidden_state
        close(loaded(tmp_path)[0](images).tokens, expected)
        state = load_file(tmp_path / "model.safetensors")
        for theirs, ours in NAMES:
            state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
        save_file(state, tmp_path / "model.safetensors")
        close(loaded(tmp_path)[0](images).tokens, expected)


def test_fields_of_another_release_are_told(transformers, tmp_path, caplog):
    fields = {key: value for key, value in HF_VIT.items() if key != "intermediate_size"}
    transformers.Dinov2Model(transformers.Dinov2Config(**fields)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "of_tomorrow": 3}))
    _, teacher = loaded(tmp_path)
    assert "of_tomorrow" in caplog.text
    assert "statistics" in caplog.text  # No preprocessor_config.json: they are a guess.
    assert teacher.statistics[:3] == (0.485, 0.456, 0.406)
