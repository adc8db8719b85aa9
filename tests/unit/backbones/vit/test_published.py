"""Published files of ViTs: the same features as the implementation that wrote them."""

from __future__ import annotations

import argparse
import json
import logging
import re

import pytest
import timm
import torch
from loading import (
    HF_VIT,
    IMAGES,
    TIMM_VIT,
    close,
    initial,
    loaded,
    opened,
    saved,
    scattered,
    tokens,
)
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import max_relative
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import WeightsError
from fd_large.weights.resolve import Sources

HEADS = {"num_heads": (2,), "statistics": (0.5,) * 6}


def normalised(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_vit_of_timm(tmp_path, suffix, scale):
    theirs = scattered(VisionTransformer(**TIMM_VIT, num_classes=3, init_values=scale))
    path = saved(theirs, tmp_path / f"vit{suffix}")
    assert opened(path).form == "timm_vit"
    net, _ = loaded(path, **HEADS)
    close(net(IMAGES).tokens, tokens(theirs))


def test_vit_of_timm_with_a_norm_for_the_mean_alone(tmp_path):
    theirs = scattered(VisionTransformer(**TIMM_VIT, num_classes=3, global_pool="avg"))
    net, _ = loaded(saved(theirs, tmp_path / "vit.pth"), **HEADS)
    close(net(IMAGES).tokens, normalised(tokens(theirs)))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_vit_of_a_clip_of_timm_asks_for_its_activation(tmp_path, activation):
    act = timm.layers.get_act_layer(activation)
    norm = timm.layers.LayerNorm  # eps 1e-5
    theirs = scattered(VisionTransformer(**TIMM_VIT, pre_norm=True, act_layer=act, norm_layer=norm))
    path = saved(theirs, tmp_path / "clip.pth")
    assert opened(path).form == "timm_clip"
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
            **TIMM_VIT,
            num_classes=3,
            global_pool=pool,
            use_abs_pos_emb=False,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
            init_values=0.1,
        )
    )
    net, teacher = loaded(saved(theirs, tmp_path / "beit.pth"), statistics=(0.5,) * 6)
    assert teacher.architecture.relative_position == ("shared" if shared else "block")
    expected = tokens(theirs)
    close(net(IMAGES).tokens, expected if pool == "token" else normalised(expected))


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
    model.save_pretrained(tmp_path)
    net, teacher = loaded(tmp_path)
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
    model.save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path)
    net, _ = loaded(tmp_path, keep_distillation_token=True)
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
    model.save_pretrained(tmp_path)
    assert opened(tmp_path).form == "hf_beit"
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.norm_eps == 1e-12
    with torch.no_grad():
        found = (model.beit if head else model)(pixel_values=IMAGES).last_hidden_state
    expected = torch.nn.functional.layer_norm(found, (32,), eps=1e-12) if pool else found
    close(net(IMAGES).tokens, expected)


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
    assert opened(tmp_path / "open_clip.pt").form == "open_clip"
    with pytest.raises(WeightsError, match="activation"):
        loaded(tmp_path / "open_clip.pt", num_heads=(4,), statistics=(0.5,) * 6)
    activation = "quick_gelu" if quick else "gelu"
    known = {"num_heads": (4,), "activation": activation, "statistics": (0.5,) * 6}
    net, _ = loaded(tmp_path / "open_clip.pt", **known)
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


DINOV2 = [(".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"), ("reg_token", "register_tokens")]


def of_dinov2(registers):
    """A ViT, and its weights in the names of DINOv2's code."""
    net = ViT(32, 2, 2, patch_size=8, image_size=32, layer_scale=0.1, num_registers=registers)
    state = {}
    for name, tensor in scattered(net).state_dict().items():
        for ours, theirs in DINOV2:
            name = name.replace(ours, theirs)
        state[name] = tensor
    return net.eval(), state | {"mask_token": torch.zeros(1, 32)}


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_and_its_map_as_timm_converts_it(tmp_path, registers):
    _, state = of_dinov2(registers)
    torch.save(state, tmp_path / "dinov2.pth")
    form = "dinov2_registers" if registers else "dinov2"
    assert opened(tmp_path / "dinov2.pth").form == form
    net, teacher = loaded(tmp_path / "dinov2.pth", num_heads=(2,))
    assert teacher.architecture.num_registers == registers
    assert teacher.statistics == (*IMAGENET.mean, *IMAGENET.std)
    theirs = VisionTransformer(
        **TIMM_VIT,
        num_classes=0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        init_values=0.1,
    ).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    expected = tokens(theirs)
    close(net(IMAGES).tokens, torch.cat([expected[:, :1], expected[:, 1 + registers :]], 1))


def test_a_student_of_unic_with_registers(tmp_path):
    net, state = of_dinov2(2)
    chunk = {re.sub(r"^blocks\.", "blocks.0.", name): tensor for name, tensor in state.items()}
    model = {f"module.encoder.{name}": tensor for name, tensor in chunk.items()}
    model["module.lp.heads.dino.cls.0.layers.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": model, "epoch": 3}, tmp_path / "unic.pth")
    assert opened(tmp_path / "unic.pth").form == "unic"
    again, _ = loaded(tmp_path / "unic.pth", num_heads=(2,))
    close(again(IMAGES).tokens, net(IMAGES).tokens)
    student, _ = initial(
        tmp_path / "unic.pth",
        "dino_vit_base_patch16",
        32,
        embed_dim=32,
        depths=(2,),
        num_heads=(2,),
        patch_size=8,
        layer_scale=0.1,
        num_registers=2,
    )
    close(student(IMAGES).tokens, net(IMAGES).tokens)


def test_open_clip_with_a_tower_of_timm(tmp_path):
    theirs = scattered(VisionTransformer(**TIMM_VIT, num_classes=0))
    state = {f"visual.trunk.{n}": t for n, t in theirs.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "open_clip.pt")
    net, _ = loaded(tmp_path / "open_clip.pt", activation="gelu", norm_eps=1e-6, **HEADS)
    close(net(IMAGES).tokens, tokens(theirs))


def clip_state(tensors):
    state = weights_of(tensors)
    return state | {
        "input_resolution": torch.tensor(48),
        "context_length": torch.tensor(7),
        "vocab_size": torch.tensor(9),
        "positional_embedding": torch.zeros(7, 8),
        "text_projection": torch.zeros(8, 4),
        "logit_scale": torch.zeros(()),
        "token_embedding.weight": torch.zeros(9, 8),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "ln_final.weight": torch.zeros(8),
    }


def test_openai_clip_with_its_text_tower(tmp_path):
    spec, tensors = oracle("fd_teacher_clip")
    torch.save(clip_state(tensors), tmp_path / "clip.pt")
    net, teacher = loaded(tmp_path / "clip.pt", num_heads=(spec["config"]["heads"],))
    assert teacher.architecture.activation == "quick_gelu"
    assert teacher.statistics == (*OPENAI_CLIP.mean, *OPENAI_CLIP.std)
    assert_matches(net, spec, tensors, "out.post_norm", images=tensors["out.clip_input"])
    assert_matches(net, spec, tensors, "out.whitened", images=tensors["out.clip_input"])


@pytest.mark.parametrize("wrapping", ["bare", "teacher", "student"])
def test_dino(wrapping, tmp_path):
    spec, tensors = oracle("fd_teacher_dino")
    state = weights_of(tensors)
    if wrapping != "bare":
        head = {"head.mlp.0.weight": torch.zeros(1)}
        other = {f"module.backbone.{n}": t + 1 for n, t in state.items()}
        prefix = "backbone." if wrapping == "teacher" else "module.backbone."
        mine = {f"{prefix}{n}": t for n, t in state.items()}
        mine |= {f"{prefix.removesuffix('backbone.')}{n}": t for n, t in head.items()}
        whole = {"student": other, "teacher": other, "args": argparse.Namespace(lr=1), "epoch": 3}
        state = whole | {wrapping: mine}
    torch.save(state, tmp_path / "dino.pth")
    part = "" if wrapping == "bare" else f"#{wrapping}"
    net, teacher = loaded(
        f"{tmp_path / 'dino.pth'}{part}",
        num_heads=(spec["config"]["num_heads"],),
        statistics=(0.5,) * 6 if wrapping == "bare" else (),
    )
    assert teacher.architecture.norm_eps == 1e-6
    assert_matches(net, spec, tensors, "out.whitened")


@pytest.mark.parametrize("name", ["fd_teacher_deit", "fd_teacher_deit_distilled"])
def test_deit_with_its_heads(name, tmp_path, caplog):
    spec, tensors = oracle(name)
    distilled = spec["config"]["distilled"]
    heads = {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    if distilled:
        heads |= {"head_dist.weight": torch.zeros(3, 32), "head_dist.bias": torch.zeros(3)}
    torch.save({"model": weights_of(tensors) | heads}, tmp_path / "deit.pth")
    given = {"num_heads": (spec["config"]["num_heads"],)}
    with caplog.at_level("INFO"):
        net, _ = loaded(tmp_path / "deit.pth", keep_distillation_token=True, **given)
    assert ("distillation token is kept" in caplog.text) == distilled
    assert "100%" in caplog.text
    assert_matches(net, spec, tensors, "out.whitened")
    if distilled:
        with caplog.at_level("INFO"):
            net, _ = loaded(tmp_path / "deit.pth", **given)
        assert "distillation token is dropped from" in caplog.text
        tokens, whole = net(tensors["input"]).tokens, tensors["out.post_norm"]
        expected = torch.cat([whole[:, :1], whole[:, 2:]], dim=1)
        assert max_relative(tokens, expected) <= spec["suggested_tolerance_max_rel"]


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


@pytest.mark.parametrize("options", [{"norm_kwargs": {"eps": 1e-3}}, {"act_kwargs": {"a": 1}}])
def test_options_of_open_clips_layers_are_not_passed_over(options, open_clip, tmp_path):
    save_file(tiny_clip(open_clip).state_dict(), tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 128, "head_width": 32, **options}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"got {next(iter(options))}"):
        loaded(tmp_path)


def test_an_open_clip_tower_that_is_another_model_of_timms_is_sent_there(tmp_path):
    theirs = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=24, num_heads=2
    )
    state = {f"visual.trunk.{n}": t for n, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 32}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"attention pool.*timm:NAME"):
        loaded(tmp_path)


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


@pytest.mark.parametrize("classes", [0, 3])
def test_a_bare_vit_of_unknown_training_asks_for_its_statistics(tmp_path, classes):
    theirs = scattered(VisionTransformer(**TIMM_VIT, num_classes=classes))
    path = saved(theirs, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"num_heads, image statistics") as caught:
        loaded(path)
    assert "--teacher.statistics" in str(caught.value)
    _, teacher = loaded(path, **HEADS)
    assert teacher.statistics == (0.5,) * 6


def test_a_file_of_dinos_training_is_its_teacher(tmp_path, caplog):
    state = scattered(VisionTransformer(**TIMM_VIT, num_classes=0)).state_dict()
    whole = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    # iBOT's student has one tensor more.
    student = {n: 2 * t for n, t in whole.items()} | {
        "module.backbone.masked_embed": torch.zeros(1, 32)
    }
    path = tmp_path / "dino.pth"
    torch.save({"student": student, "teacher": whole, "epoch": 3}, path)
    with caplog.at_level(logging.INFO):
        net, teacher = loaded(path, num_heads=(2,))
    assert f"the teacher is used; for the other, name {path}#student" in caplog.text
    assert teacher.source == f"{path}#teacher"  # The recipe says it from here on.
    assert teacher.statistics[:3] == (0.485, 0.456, 0.406)
    assert net.norm.weight.equal(state["norm.weight"])
    net, _ = loaded(f"{path}#student", num_heads=(2,))
    assert net.norm.weight.equal(2 * state["norm.weight"])
    # A run that an earlier version began names no part, and learns from the student.
    earlier = Sources(settled={str(path): teacher.statistics})
    assert earlier.resolve(str(path)).published.file["norm.weight"].equal(2 * state["norm.weight"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"reg_tokens": 2}, "register tokens"),
        ({"no_embed_class": True, "init_values": 0.1}, "DeiT III"),
        ({"global_pool": "map", "class_token": False}, "attention pooling"),
        ({"qk_norm": True}, "inside attention"),
        ({"pos_embed": "none"}, "no positions"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ],
)
def test_models_of_other_kinds_are_sent_to_timm(tmp_path, arguments, told):
    theirs = scattered(VisionTransformer(**TIMM_VIT, num_classes=0, **arguments))
    path = saved(theirs, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(path, image_size=32, **HEADS)
    message = str(caught.value)
    assert "--teacher.model timm:NAME" in message
    assert "allow" not in message
    assert "model auto" not in message


def test_tensors_left_over_by_the_model_of_the_file_itself(tmp_path):
    state = scattered(VisionTransformer(**TIMM_VIT, num_classes=0)).state_dict()
    torch.save(state | {"blocks.0.extra.weight": torch.ones(2)}, tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"blocks\.0\.extra") as caught:
        loaded(tmp_path / "vit.pth", **HEADS)
    assert "--teacher.model timm:NAME" in str(caught.value)
    assert "model auto" not in str(caught.value)


@pytest.mark.parametrize("name", ["ViTMAE", "ViTMSN"])
def test_relatives_of_vit_in_transformers(transformers, name, tmp_path):
    fields = {**HF_VIT, "mask_ratio": 0.0} if name == "ViTMAE" else HF_VIT
    config = getattr(transformers, f"{name}Config")(**fields)
    theirs = scattered(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    net, teacher = loaded(tmp_path)
    assert teacher.statistics == (0.5, 0.5, 0.5, 0.25, 0.25, 0.25)
    if name != "ViTMAE":  # Which shuffles its patches.
        with torch.no_grad():
            close(net(IMAGES).tokens, theirs(IMAGES).last_hidden_state)
