"""A configuration beside the weights tells what names and shapes cannot."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from loading import (
    HF_VIT,
    IMAGES,
    TIMM_SWIN,
    TIMM_VIT,
    TINY,
    close,
    loaded,
    made,
    opened,
    saved,
    scattered,
    student_run,
    teacher_run,
    tokens,
)
from safetensors.torch import save_file
from torch import nn

from fd_large.backbones.statistics import IMAGENET
from fd_large.engine.frozen import frozen_weights
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, overrides, resolve, set_fields
from fd_large.weights.convert import write
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import reconcile


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swinv2_tiny_window8_256", {**TIMM_SWIN, "pretrained_window_sizes": (3, 2)}),
        ("swin_tiny_patch4_window7_224", TIMM_SWIN),
        ("vit_base_patch16_clip_quickgelu_224", {**TIMM_VIT, "act_layer": "quick_gelu"}),
        ("vit_base_patch16_224", TIMM_VIT),
        # A bare file of these names is refused: others without a class token have the same.
        ("vit_base_patch16_siglip_gap_224", {**TIMM_VIT, "class_token": False, "fc_norm": False}),
    ],
)
def test_a_folder_of_timm_on_the_hub_tells_everything(tmp_path, name, arguments):
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    config = theirs.pretrained_cfg
    assert teacher.statistics == (*config["mean"], *config["std"])
    close(net(IMAGES).tokens, tokens(theirs))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_224"])
def test_a_model_that_normalises_the_mean_of_its_tokens_is_timms(tmp_path, name):
    arguments = {**TIMM_VIT, "global_pool": "avg"}
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    assert teacher.model == "timm"
    with torch.no_grad():
        assert net(IMAGES).tokens.equal(theirs.forward_features(IMAGES)[:, 1:])
    # A run that an earlier version began names a model of ours, with a norm added, and keeps it.
    weights = opened(tmp_path)
    earlier = reconcile(weights, Architecture(), None, name="auto", where="", section="teacher")
    net, teacher = loaded(tmp_path, "vit", **set_fields(overrides(earlier)))
    assert teacher.model == "vit"
    close(net(IMAGES).tokens, nn.functional.layer_norm(tokens(theirs), (32,), eps=1e-6))


def test_a_folder_of_timm_with_other_arguments_is_made_with_them(tmp_path):
    arguments = {"depths": [1, 1, 2, 1], "global_pool": "avg", "drop_path_rate": 0.1}
    theirs = scattered(timm.create_model("convnextv2_atto", num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    # What changes no map is left out, as in runs of earlier versions.
    assert teacher.architecture.timm_name == 'convnextv2_atto{"depths": [1, 1, 2, 1]}'
    images = IMAGES.repeat(1, 1, 2, 2)
    with torch.no_grad():
        assert net(images).tokens.equal(theirs.forward_features(images).flatten(2).mT)


def test_transformers_wrapper_of_a_model_of_timm_is_that_model(tmp_path):
    theirs = scattered(timm.create_model("test_vit", num_classes=0))
    state = {f"timm_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "model_type": "timm_wrapper", "model_args": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net, _ = loaded(tmp_path)
    images = IMAGES.repeat(1, 1, 5, 5)
    with torch.no_grad():
        assert net(images).tokens.equal(theirs.forward_features(images)[:, 1:])


def of_timm(name, path, **arguments):
    """A folder of a model of timm as timm writes it."""
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, path, safe_serialization=True)
    return theirs


@pytest.mark.parametrize("name", ["convnextv2_atto", "efficientvit_b0"])
def test_a_folder_of_timm_that_no_family_reads_is_that_model(tmp_path, name):
    theirs = of_timm(name, tmp_path)
    net, teacher = loaded(tmp_path)
    assert (teacher.model, teacher.architecture.timm_name) == ("timm", name)
    config = theirs.pretrained_cfg
    assert teacher.statistics == (*config["mean"], *config["std"])
    images = IMAGES.repeat(1, 1, 2, 2)
    with torch.no_grad():
        close(net(images).tokens, theirs.forward_features(images).flatten(2).mT)


@pytest.fixture
def rotary(tmp_path):
    """The folder of a ViT with rotary positions, whose tensors have a plain ViT's names."""
    name = "vit_small_patch16_rope_224"
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    state = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in net.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "pretrained_cfg": net.pretrained_cfg})
    )
    return tmp_path


def test_rotary_positions_are_not_left_out(rotary):
    run = teacher_run(rotary, image_size=224)
    assert run.teacher.architecture.timm_name == "vit_small_patch16_rope_224"
    assert frozen_weights(run.teacher, Sources(), where="--teacher.source").match.complaints == []
    named = {"embed_dim": 384, "depths": (12,), "num_heads": (6,), "absolute_position": False}
    with pytest.raises(WeightsError, match="vit_small_patch16_rope_224"):
        teacher_run(rotary, "vit_base_patch16", **named)
    with pytest.raises(WeightsError, match="vit_small_patch16_rope_224"):
        student_run(rotary, "vit_base_patch16", **named)


def test_a_file_that_another_models_configuration_stands_beside(rotary):
    saved(made("vit_base_patch16"), rotary / "model.safetensors")
    with pytest.raises(WeightsError, match="vit_small_patch16_rope_224"):
        frozen_weights(teacher_run(rotary).teacher, Sources(), where="--teacher.source")


def test_models_that_nothing_reads_are_named(transformers, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF_VIT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for said, told in (
        ({**config, "model_type": "blip_vision_model"}, "blip_vision_model"),
        ({**config, "model_type": "swin", "window_size": 4}, "swin"),
        ({"architecture": "vit_of_tomorrow"}, "vit_of_tomorrow"),
        ({"architecture": "resnet10t", "model_args": {"layers": [1, 1, 1, 1]}}, "layers"),
        ({"architecture": "resnet10t", "model_args": {"checkpoint_path": "x.pth"}}, "checkpoint"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 0}}, "num_heads"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": [3]}, "config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(WeightsError, match=told) as caught:
            loaded(tmp_path)
        # The weights may be a student's, or named without a flag.
        assert "set --teacher" not in str(caught.value)


def test_a_damaged_config_is_named(tmp_path):
    net, architecture = (
        made("vit_base_patch16"),
        resolve("vit_base_patch16", TINY["vit_base_patch16"]),
    )
    write(net.state_dict().items(), architecture, "fd", tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: .*JSON"):
        opened(tmp_path / "net")
    bad = {"fd_large": {"architecture": {"colour": 1}}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(bad))
    with pytest.raises(WeightsError, match="not the fields of an"):
        opened(tmp_path / "net")


@pytest.mark.parametrize(
    "config",
    [
        {"fd_large": 3},
        {"fd_large": {"architecture": ["embed_dim"]}},
        {"architecture": "vit_base_patch16_224", "pretrained_cfg": None},
    ],
)
def test_a_malformed_configuration_is_one_sentence(config, tmp_path):
    torch.save(made("vit_base_patch16").state_dict(), tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"not valid for its format|config"):
        opened(tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_path", "evil.pth"),
        ("pretrained", True),
        ("pretrained_cfg", {"file": "evil.pth"}),
        ("cache_dir", "elsewhere"),
        ("depth", 10**8),
        ("depths", [600, 600]),
        ("img_size", 10**9),
        ("embed_dim", {"a": 1}),
        ("num_heads", 0),
        ("patch_size", 0),
    ],
)
def test_timms_configuration_sets_plain_values_alone(tmp_path, name, value):
    torch.save(made("vit_base_patch16").state_dict(), tmp_path / "net.pth")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {name: value}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
    with pytest.raises(WeightsError, match=r"not passed|cannot make|more blocks"):
        teacher_run(tmp_path / "net.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"std": [0.5, 0.5, 0.0]},
        {"std": [0.5, 0.5]},
        {"mean": "abc"},
        {"architecture": {"num_heads": [0]}},
        {"architecture": {"norm_eps": -1.0}},
        {"architecture": {"depths": [10**8]}},
        {"architecture": {"embed_dim": "wide"}},
        {"architecture": {"family": "unheard of"}},
    ],
)
def test_a_configuration_of_ours_that_no_model_has_is_refused(tmp_path, changes):
    name = "vit_base_patch16"
    net, architecture = made(name), resolve(name, TINY[name])
    write(net.state_dict().items(), architecture, "fd", tmp_path / "net", statistics=IMAGENET)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    own = config["fd_large"]
    opened(tmp_path / "net")
    changed = {k: own[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    (tmp_path / "net" / "config.json").write_text(json.dumps({"fd_large": own | changed}))
    with pytest.raises(WeightsError, match=r"config\.json|configuration"):
        opened(tmp_path / "net")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "dinov2", "num_hidden_layers": 10**8},
        {"model_type": "siglip", "vision_config": {"num_hidden_layers": 10**8}},
        {"model_type": "hiera", "depths": [600, 600]},
    ],
)
def test_a_depth_that_no_model_has_is_refused_before_anything_is_built(tmp_path, config):
    torch.save(made("vit_base_patch16").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="more blocks"):
        teacher_run(tmp_path)


def test_statistics_come_from_the_preprocessor(transformers, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF_VIT)).save_pretrained(tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    _, teacher = loaded(tmp_path)
    assert teacher.statistics == (0.5,) * 6


def test_without_its_config_a_folder_asks_for_what_is_not_told(transformers, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF_VIT)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path)
    assert "got no activation, norm_eps, num_heads" in str(caught.value)
    loaded(tmp_path, activation="gelu", norm_eps=1e-12, num_heads=(4,))
