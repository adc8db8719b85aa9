"""Class names through a text tower: what transformers and open_clip themselves say."""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from loading import scattered

from fd_large.engine.text_tower import check_prompts, classes_of, probabilities
from fd_large.errors import ConfigError, VersionError, WeightsError

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
    with pytest.raises(ConfigError, match=r"16 .* 12 .*layer embedding"):
        probabilities(torch.zeros(2, 16), classes)
    with pytest.raises(WeightsError, match="text tower"):
        classes_of(str(tmp_path / "nowhere"), NAMES, PROMPTS)
    with pytest.raises(ConfigError, match="class names"):
        check_prompts("cat", PROMPTS)
    with pytest.raises(ConfigError, match="prompts"):
        check_prompts(NAMES, ("a photo",))


def test_braces_that_are_no_place_for_a_name_are_text(tmp_path):
    tiny_clip.transformers_clip(tmp_path)
    found = classes_of(str(tmp_path), ("cat",), ("a {} in {red}",))
    same = classes_of(str(tmp_path), ("cat in {red}",), ("a {}",))
    assert torch.equal(found.vectors, same.vectors)


def test_classes_of_clip_of_transformers(tmp_path):
    model = tiny_clip.transformers_clip(tmp_path)
    assert_as_transformers(tmp_path, model)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_classes_of_siglip(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    tiny_clip.transformers_clip(tmp_path)  # Its tokenizer.
    (tmp_path / "model.safetensors").unlink()
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 16
    text = {**sizes, "vocab_size": 9, "max_position_embeddings": 8, "projection_size": 12}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    model = scattered(getattr(transformers, f"{kind}Model")(config)).eval()
    model.save_pretrained(tmp_path)
    assert_as_transformers(tmp_path, model)


def assert_as_transformers(folder, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [prompt.format(name) for name in NAMES for prompt in PROMPTS]
    given = tokenizer(
        texts, padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        vectors = model.get_text_features(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).pooler_output
    wanted = F.normalize(F.normalize(vectors, dim=-1).view(3, 2, -1).mean(1), dim=-1)
    found = classes_of(str(folder), NAMES, PROMPTS)
    assert torch.allclose(found.vectors, wanted, atol=1e-5)
    assert found.scale == pytest.approx(model.logit_scale.exp().item())


KERNEL = "evil-org/evil-kernel"


@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_kernel_that_a_folder_names_is_not_asked_for(tmp_path, monkeypatch, key, part):
    """transformers before 5.3 fetched and imported it: CVE-2026-4372."""
    asked = []
    kernels = types.ModuleType("kernels")
    kernels.__spec__ = ModuleSpec("kernels", None)
    kernels.get_kernel = lambda *given, **named: asked.append(given)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    tiny_clip.transformers_clip(tmp_path)
    plain = classes_of(str(tmp_path), NAMES, PROMPTS)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config)[key] = KERNEL
    (tmp_path / "config.json").write_text(json.dumps(config))
    classes_of.cache_clear()
    assert torch.equal(classes_of(str(tmp_path), NAMES, PROMPTS).vectors, plain.vectors)
    assert not asked


def test_code_of_a_folder_is_not_run(tmp_path):
    tiny_clip.transformers_clip(tmp_path)
    marker, code = tmp_path / "ran", "modeling_evil.py"
    (tmp_path / code).write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: ...\n")
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        config = json.loads((tmp_path / name).read_text())
        config["auto_map"] = {key: "modeling_evil.Evil"}
        (tmp_path / name).write_text(json.dumps(config))
    classes_of(str(tmp_path), NAMES, PROMPTS)
    assert not marker.exists()
    # Weights are read by the project's reader, which imports nothing.
    (tmp_path / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"text_projection.weight": Evil()}, tmp_path / "pytorch_model.bin")
    classes_of.cache_clear()
    with pytest.raises(WeightsError):
        classes_of(str(tmp_path), NAMES, PROMPTS)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "evil"}),
        ("config.json", {"model_type": ["clip"]}),
        ("config.json", {"text_config": None}),
        ("config.json", {"text_config": {"hidden_size": 1e300}}),
        ("config.json", {"text_config": {"num_hidden_layers": 10**6}}),
        ("config.json", {"text_config_dict": {"num_hidden_layers": 1}}),
        ("config.json", {"text_config_dict": {"vocab_size": 10**9}}),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, file, change):
    tiny_clip.transformers_clip(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match="zero_shot"):
        classes_of(str(tmp_path), NAMES, PROMPTS)


def test_a_release_of_transformers_with_known_holes_is_refused(tmp_path, monkeypatch):
    import transformers

    tiny_clip.transformers_clip(tmp_path)
    monkeypatch.setattr(transformers, "__version__", "5.2.0")
    with pytest.raises(VersionError, match=r"5\.2\.0"):
        classes_of(str(tmp_path), NAMES, PROMPTS)


@pytest.mark.parametrize(
    "change",
    [
        {"hf_model_name": "evil/model"},
        {"hf_tokenizer_name": "evil/tokenizer"},
        {"tokenizer_mode": "syntax"},
        {"layers": 10**9},
        {"width": 24},
        {"vocab_size": 10**9},
        {"act_kwargs": {"evil": {}}},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_folder_of_open_clip_names_nothing_to_fetch(tmp_path, change):
    tiny_clip.open_clip_model(tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="text tower"):
        classes_of(str(tmp_path / "clip"), NAMES, PROMPTS)


def test_the_image_tower_of_a_folder_is_not_built(tmp_path):
    tiny_clip.open_clip_model(tmp_path / "clip")
    plain = classes_of(str(tmp_path / "clip"), NAMES, PROMPTS)
    file = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"] = {"timm_model_name": "hf-hub:evil/model"}
    file.write_text(json.dumps(config))
    classes_of.cache_clear()
    assert torch.equal(classes_of(str(tmp_path / "clip"), NAMES, PROMPTS).vectors, plain.vectors)


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/evil/model", "ViT-B-32//a.pt"])
def test_open_clip_takes_names_of_its_own_table_alone(name):
    with pytest.raises(WeightsError, match="text tower"):
        classes_of(f"open_clip:{name}", NAMES, PROMPTS)


@pytest.mark.parametrize("text", ["[]", "7", "{}", '{"model_cfg": 3}', "[" * 100_000])
def test_a_damaged_configuration_of_open_clip_is_a_sentence(tmp_path, text):
    tiny_clip.open_clip_model(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_config.json").write_text(text)
    with pytest.raises(WeightsError):
        classes_of(str(tmp_path / "clip"), NAMES, PROMPTS)
