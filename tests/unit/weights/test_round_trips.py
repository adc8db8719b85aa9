"""Weights of independent implementations here, and ours there: the same features."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from loading import close, loaded, scattered
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from fd_large.backbones.registry import build
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.convert import write
from fd_large.weights.source import Sources

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEADS = {"num_heads": (2,)}


def saved(net, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    return path


def tokens(net, images=IMAGES):
    with torch.no_grad():
        found = net.forward_features(images)
    return found.flatten(1, 2) if found.dim() == 4 else found


def normalised(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


# --- timm to us ---


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_vit_of_timm(tmp_path, suffix, scale):
    theirs = scattered(VisionTransformer(**VIT, num_classes=3, init_values=scale))
    path = saved(theirs, tmp_path / f"vit{suffix}")
    assert Sources().open(path).form == "timm_vit"
    net, _ = loaded(path, **HEADS)
    close(net(IMAGES).tokens, tokens(theirs))


def test_vit_of_timm_with_a_norm_for_the_mean_alone(tmp_path):
    theirs = scattered(VisionTransformer(**VIT, num_classes=3, global_pool="avg"))
    net, _ = loaded(saved(theirs, tmp_path / "vit.pth"), **HEADS)
    close(net(IMAGES).tokens, normalised(tokens(theirs)))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_vit_of_a_clip_of_timm_asks_for_its_activation(tmp_path, activation):
    act = timm.layers.get_act_layer(activation)
    norm = timm.layers.LayerNorm  # eps 1e-5
    theirs = scattered(VisionTransformer(**VIT, pre_norm=True, act_layer=act, norm_layer=norm))
    path = saved(theirs, tmp_path / "clip.pth")
    assert Sources().open(path).form == "timm_clip"
    with pytest.raises(WeightsError, match=r"no activation.*--teacher\.architecture\.activation"):
        loaded(path, **HEADS)
    norm_eps = theirs.norm.eps
    assert norm_eps == pytest.approx(1e-5) or norm_eps == pytest.approx(1e-6)
    net, _ = loaded(path, activation=activation, norm_eps=norm_eps, **HEADS)
    close(net(IMAGES).tokens, tokens(theirs))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_beit_of_timm(tmp_path, shared, pool):
    theirs = scattered(
        Beit(
            **VIT,
            num_classes=3,
            global_pool=pool,
            use_abs_pos_emb=False,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
            init_values=0.1,
        )
    )
    net, teacher = loaded(saved(theirs, tmp_path / "beit.pth"))
    assert teacher.architecture.relative_position == ("shared" if shared else "block")
    expected = tokens(theirs)
    close(net(IMAGES).tokens, expected if pool == "token" else normalised(expected))


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 3), "num_heads": (2, 4)}


def test_swin_of_timm(tmp_path):
    theirs = scattered(SwinTransformer(**SWIN, window_size=4, num_classes=3))
    path = saved(theirs, tmp_path / "swin.pth")
    assert Sources().open(path).form == "timm_swin"
    net, _ = loaded(path)
    close(net(IMAGES).tokens, tokens(theirs))


@pytest.mark.parametrize("pretrained", [(0, 0), (3, 2)])
def test_swinv2_of_timm(tmp_path, pretrained):
    theirs = scattered(
        SwinTransformerV2(**SWIN, window_size=4, pretrained_window_sizes=pretrained, num_classes=3)
    )
    path = saved(theirs, tmp_path / "swinv2.pth")
    assert Sources().open(path).form == "timm_swinv2"
    with pytest.raises(WeightsError, match="no pretrained_window_sizes, window_size"):
        loaded(path)
    net, _ = loaded(path, window_size=4, pretrained_window_sizes=pretrained)
    close(net(IMAGES).tokens, tokens(theirs))


def test_the_other_swinv2_of_timm_is_refused(tmp_path):
    net = timm.create_model(
        "swinv2_cr_tiny_224", pretrained=False, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    )
    with pytest.raises(WeightsError, match="another position bias"):
        Sources().open(saved(net, tmp_path / "cr.pth"))


# --- us to timm ---

STUDENT_VIT = Architecture(embed_dim=32, depths=(2,), num_heads=(2,), patch_size=8, image_size=32)


def ours(name, fields):
    net = scattered(build(name, fields, initialization="official", seed=0))
    return net, resolve(name, fields)


def test_our_vit_in_timm(tmp_path):
    net, architecture = ours("dino_vit_base_patch16", STUDENT_VIT)
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "vit.safetensors")
    theirs = VisionTransformer(**VIT, num_classes=0).eval()
    theirs.load_state_dict(load_file(file))
    close(tokens(theirs), net(IMAGES).tokens)


def test_our_student_vit_in_timms_beit(tmp_path):
    net, architecture = ours("vit_base_patch16", STUDENT_VIT)
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "beit.safetensors")
    theirs = Beit(
        **VIT,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
    ).eval()
    theirs.load_state_dict(load_file(file))
    close(tokens(theirs), net(IMAGES).tokens)


OUR_SWIN = Architecture(
    embed_dim=16, depths=(2, 3), num_heads=(2, 4), window_size=4, patch_size=2, image_size=32
)


@pytest.mark.parametrize("name", ["swinv2_base", "swin_base_esvit"])
def test_our_swins_in_timm(tmp_path, name):
    net, architecture = ours(name, OUR_SWIN)
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "swin.pth")
    make = SwinTransformerV2 if name == "swinv2_base" else SwinTransformer
    theirs = make(**SWIN, window_size=4, num_classes=0).eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    close(tokens(theirs), net(IMAGES).tokens)


# --- transformers ---


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def pretrained(net, folder):
    net.save_pretrained(folder)
    return folder


HF_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("whole", [True, False])
def test_clip_of_transformers(transformers, tmp_path, activation, whole):
    vision = {**HF_VIT, "hidden_act": activation}
    if whole:
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 20,
            "max_position_embeddings": 5,
        }
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        model = scattered(transformers.CLIPModel(config))
        tower = model.vision_model
    else:
        model = scattered(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))
        tower = getattr(model, "vision_model", model)
    net, teacher = loaded(pretrained(model, tmp_path))
    assert teacher.architecture.activation == activation
    assert teacher.architecture.num_heads == (4,)
    with torch.no_grad():
        raw = tower(pixel_values=IMAGES).last_hidden_state
        expected = tower.post_layernorm(raw)
    close(net(IMAGES).tokens, expected)


@pytest.mark.parametrize("stored_by", [4, 5])
@pytest.mark.parametrize("head", [True, False])
def test_vit_of_transformers(transformers, tmp_path, stored_by, head):
    config = transformers.ViTConfig(**HF_VIT, layer_norm_eps=1e-5)
    model = (
        transformers.ViTForImageClassification(config) if head else transformers.ViTModel(config)
    )
    model = scattered(model)
    pretrained(model, tmp_path)
    if stored_by == 5:
        rename(tmp_path / "model.safetensors")
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.norm_eps == 1e-5
    with torch.no_grad():
        base = model.vit if head else model
        expected = base(pixel_values=IMAGES).last_hidden_state
    close(net(IMAGES).tokens, expected)


def rename(path):
    """The names that version 5 has in memory; on disk it keeps those of 4."""
    state = {}
    for name, tensor in load_file(path).items():
        for old, new in (
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(old, new)
        state[name] = tensor
    save_file(state, path)


def test_deit_of_transformers(transformers, tmp_path):
    model = scattered(transformers.DeiTModel(transformers.DeiTConfig(**HF_VIT)))
    net, _ = loaded(pretrained(model, tmp_path), keep_distillation_token=True)
    with torch.no_grad():
        close(net(IMAGES).tokens, model(pixel_values=IMAGES).last_hidden_state)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_beit_of_transformers(transformers, tmp_path, shared, pool, head):
    config = transformers.BeitConfig(
        **HF_VIT,
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
        use_absolute_position_embeddings=head,
        use_mask_token=head,
        use_mean_pooling=pool,
        layer_scale_init_value=0.1,
    )
    make = transformers.BeitForImageClassification if head else transformers.BeitModel
    model = scattered(make(config))
    pretrained(model, tmp_path)
    assert Sources().open(tmp_path).form == "hf_beit"
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.norm_eps == 1e-12
    with torch.no_grad():
        found = (model.beit if head else model)(pixel_values=IMAGES).last_hidden_state
    expected = torch.nn.functional.layer_norm(found, (32,), eps=1e-12) if pool else found
    close(net(IMAGES).tokens, expected)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_swinv2_of_transformers(transformers, tmp_path, head, sharded):
    config = transformers.Swinv2Config(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 3],
        num_heads=[2, 4],
        window_size=4,
        pretrained_window_sizes=[3, 2],
    )
    make = transformers.Swinv2ForImageClassification if head else transformers.Swinv2Model
    model = scattered(make(config))
    model.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.pretrained_window_sizes == (3, 2)
    with torch.no_grad():
        base = model.swinv2 if head else model
        close(net(IMAGES).tokens, base(pixel_values=IMAGES).last_hidden_state)


def test_swin_of_transformers(transformers, tmp_path):
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4
    )
    model = scattered(transformers.SwinModel(config))
    net, _ = loaded(pretrained(model, tmp_path))
    with torch.no_grad():
        close(net(IMAGES).tokens, model(pixel_values=IMAGES).last_hidden_state)


def test_statistics_come_from_the_preprocessor(transformers, tmp_path):
    pretrained(transformers.ViTModel(transformers.ViTConfig(**HF_VIT)), tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    _, teacher = loaded(tmp_path)
    assert teacher.statistics == (0.5,) * 6


def test_without_its_config_a_folder_asks_for_what_is_not_told(transformers, tmp_path):
    pretrained(transformers.ViTModel(transformers.ViTConfig(**HF_VIT)), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path)
    assert "got no activation, norm_eps, num_heads" in str(caught.value)
    loaded(tmp_path, activation="gelu", norm_eps=1e-12, num_heads=(4,))


# --- open_clip ---


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


def tiny_clip(open_clip, **vision):
    torch.manual_seed(0)
    tower = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "head_width": 32}
    text = {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
    quick = vision.pop("quick_gelu", False)
    return scattered(
        open_clip.CLIP(embed_dim=8, vision_cfg={**tower, **vision}, text_cfg=text, quick_gelu=quick)
    )


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("wrapping", ["bare", "trained"])
def test_open_clip(open_clip, tmp_path, quick, wrapping):
    model = tiny_clip(open_clip, quick_gelu=quick)
    state = model.state_dict()
    if wrapping == "trained":
        state = {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}
    torch.save(state, tmp_path / "open_clip.pt")
    assert Sources().open(tmp_path / "open_clip.pt").form == "open_clip"
    with pytest.raises(WeightsError, match="activation"):
        loaded(tmp_path / "open_clip.pt", num_heads=(4,))
    activation = "quick_gelu" if quick else "gelu"
    net, _ = loaded(tmp_path / "open_clip.pt", num_heads=(4,), activation=activation)
    close(net(IMAGES).tokens, clip_tokens(model.visual))


def clip_tokens(tower):
    """All tokens after the last norm, which open_clip gives to whoever wraps the norm."""
    seen = {}
    tower.ln_post.register_forward_hook(lambda m, i, o: seen.update(given=i[0], norm=m))
    blocks = {}
    tower.transformer.resblocks[-1].register_forward_hook(lambda m, i, o: blocks.update(out=o))
    with torch.no_grad():
        tower(IMAGES)
        return tower.ln_post(blocks["out"])


def test_open_clip_folder_of_the_hub(open_clip, tmp_path):
    model = tiny_clip(open_clip, quick_gelu=True)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "head_width": 32},
        },
        "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.activation == "quick_gelu"
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    close(net(IMAGES).tokens, clip_tokens(model.visual))


def test_open_clip_with_a_tower_of_timm(tmp_path):
    theirs = scattered(VisionTransformer(**VIT, num_classes=0))
    state = {f"visual.trunk.{n}": t for n, t in theirs.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "open_clip.pt")
    net, _ = loaded(tmp_path / "open_clip.pt", activation="gelu", norm_eps=1e-6, **HEADS)
    close(net(IMAGES).tokens, tokens(theirs))


def test_open_clip_folder_with_a_tower_of_timm(tmp_path):
    """What timm knows of the tower, not what open_clip's own towers have."""
    name = "vit_tiny_patch16_224"
    theirs = scattered(timm.create_model(name, num_classes=0, img_size=32, depth=2))
    state = {f"visual.trunk.{n}": t for n, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": name, "image_size": 32}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.norm_eps == 1e-6
    assert teacher.architecture.num_heads == (3,)
    close(net(IMAGES).tokens, tokens(theirs))
