"""Formats are recognised by names; a file's models come in our names, whole or refused."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import pytest
import torch
from loading import initial, loaded, made, opened
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import fd_swinv2, max_relative
from translated_names import translate

from fd_large.backbones.published import TargetModel
from fd_large.backbones.registry import FAMILIES
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.published import shared_bias as of_swinv2
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.translation import Piece, expanded, translated
from fd_large.backbones.vit.published import shared_bias as of_vit
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.coverage import Fitted, covered
from fd_large.weights.published import FORMATS, detect


def test_a_student_starts_from_a_published_file(tmp_path):
    spec, tensors = oracle("fd_vit_shared_rpb_a")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    config = spec["config"]
    fields = {
        "embed_dim": config["embed_dim"],
        "depths": (config["depth"],),
        "num_heads": (config["num_heads"],),
        "patch_size": config["patch_size"],
        "mlp_ratio": config["mlp_ratio"],
    }
    net, _ = initial(tmp_path / "fd.pth", "vit_base_patch16", config["img_size"], **fields)
    assert_matches(net, spec, tensors, "out.final")


def test_a_rectangular_net_is_filled_by_its_shapes(tmp_path):
    """No architecture of ours is rectangular, but the model and the loader are."""
    spec, tensors = oracle("fd_swinv2_d_rect_nonorm_ape")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    net = fd_swinv2(spec["config"])
    weights = opened(tmp_path / "fd.pth")
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    pieces, _ = weights.adapted(weights.found, expected)
    net.load_state_dict(dict(Fitted(pieces, weights.file, expected, label="oracle")))
    assert_matches(net, spec, tensors, "out.final")


def test_tensors_without_numbers_or_of_strange_shapes(tmp_path):
    state, path = made("dino_vit_base_patch16").state_dict(), tmp_path / "net.pth"
    torch.save({name: torch.empty(0) for name in state}, path)
    with pytest.raises(WeightsError, match=r"empty tensors.*\(0,\).*ZeRO-3"):
        opened(path)
    name = "patch_embed.proj.weight"
    torch.save({**state, name: state[name].flatten(1)}, path)
    with pytest.raises(WeightsError, match=r"vit .*\(32, 192\)"):
        opened(path)


def swinv2(**options):
    return SwinV2(8, (2, 2), (1, 2), window_size=4, patch_size=2, **options)


def swin(stages=4):
    depths, heads = (1,) * stages, (1, 1, 2, 2)[:stages]
    return Swin(8, depths, heads, window_size=2, patch_size=2, image_size=32)


def vit(**options):
    return ViT(8, 2, 2, patch_size=4, image_size=16, **options)


STUDENT = {
    "absolute_position": False,
    "relative_position": "shared",
    "layer_scale": 0.1,
    "qkv_bias": "qv",
}


def renamed(net, pairs):
    """A net's state under published names."""
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state


def check(net, state, form, wrapping=()):
    """The state is told as `form`, and translated it is exactly the net's own."""
    assert detect(state, wrapping=wrapping) == form
    own = {name for name in state if not name.startswith("feature_model.")}
    alike = [known.family for known in FORMATS.values() if known.format.is_it(own, wrapping)]
    assert all(family is FORMATS[form].family for family in alike)
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    found = dict(covered(expected, translate(form, state.items()), where="test"))
    for name, parameter in net.named_parameters():
        assert torch.equal(found[name], parameter), name


FD_SWIN = [
    (".cpb_mlp.", ".rpe_mlp."),
    (".position_bias.", ".rel_pos_bias."),
    (".extra_norm.", ".enorm."),
]


@pytest.mark.parametrize("shared", [False, True])
def test_fd_swinv2_student_without_its_teacher(shared):
    net = swinv2(extra_norm_every=2, shared_position_bias=shared)
    state = {f"encoder.{n}": t for n, t in renamed(net, FD_SWIN).items()}
    state |= {
        "encoder.layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(1),
        "feature_model.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(1),
    }
    check(net, state, "fd_swinv2")


def test_fd_vit_student():
    net = vit(**STUDENT)
    state = {f"encoder.{n}": t for n, t in net.state_dict().items()}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(1)
    state["feature_model.cls_token"] = torch.zeros(1)
    check(net, state, "fd_vit")


def test_pre_training_of_beit_is_no_student():
    """Its statistics are not the students'; nothing in the file tells them."""
    net = vit(**STUDENT)
    state = {**net.state_dict(), "mask_token": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    check(net, state, "beit_pretraining")
    assert FORMATS["beit_pretraining"].format.statistics is None


def test_fd_projection_becomes_a_linear_layer():
    items = [("decoder.0.weight", torch.ones(6, 4, 1)), ("decoder.0.bias", torch.zeros(6))]
    for form in ("fd_swinv2", "fd_vit"):
        got = dict(translate(form, items))
        assert got["projection.weight"].shape == (6, 4)
        assert got["projection.bias"].shape == (6,)


def test_official_swinv2_and_our_own_files():
    net = swinv2()
    state = net.state_dict() | {
        "head.weight": torch.zeros(10, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    check(net, state, "swinv2")
    own = swinv2(extra_norm_every=1, shared_position_bias=True)
    check(own, own.state_dict(), "swinv2")


@pytest.mark.parametrize("cpb", [".cpb_mlp.", ".rpe_mlp."])
def test_simmim_swinv2(cpb):
    net = swinv2()
    state = {f"encoder.{n}": t for n, t in renamed(net, [(".cpb_mlp.", cpb)]).items()}
    state |= {"encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1, 1, 1, 1)}
    check(net, state, "simmim_swinv2")


def test_esvit_with_its_heads_and_swin_without():
    net = swin()
    state = net.state_dict() | {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
    }
    check(net, state | {"head.weight": torch.zeros(3, 8)}, "swin")
    check(net, state, "esvit", wrapping=("student",))
    heads = {"head.mlp.0.weight": torch.zeros(1), "head_dense.last_layer.weight_g": torch.zeros(1)}
    check(net, state | heads, "esvit")


def test_first_stages_end_with_a_norm_that_only_normalises():
    whole, target = swin(), swin(stages=3)
    state = whole.state_dict()
    pieces = translated(state, FORMATS["swin"].format.rows).pieces
    three = resolve("swin_base_esvit_s3", Architecture(embed_dim=8, num_heads=(1, 1, 2)))
    wanted = TargetModel(three, {}, Architecture(depths=(1, 1, 1, 1)), [])
    pieces, _ = FAMILIES["swin"].published.adapt(pieces, wanted)
    found = {name: piece.read(state) for name, piece in pieces.items()}
    target.load_state_dict(found)
    assert (found["norm.weight"] == 1).all()
    assert (found["norm.bias"] == 0).all()


def test_a_shared_bias_is_copied_to_every_block():
    shared, own = swinv2(shared_position_bias=True), swinv2()
    expected = {name: tuple(p.shape) for name, p in own.named_parameters()}
    state = shared.state_dict()
    pieces, _ = expanded({name: Piece((name,)) for name in state}, expected, of_swinv2)
    assert pieces.keys() == expected.keys()
    table = "layers.1.position_bias.cpb_mlp.2.weight"
    assert pieces["layers.1.blocks.1.attn.cpb_mlp.2.weight"].sources == (table,)
    block = vit(**{**STUDENT, "relative_position": "block"})
    expected = {name: tuple(p.shape) for name, p in block.named_parameters()}
    pieces = {name: Piece((name,)) for name in vit(**STUDENT).state_dict()}
    assert expanded(pieces, expected, of_vit)[0].keys() == expected.keys()
    same = {name: tuple(t.shape) for name, t in state.items()}
    pieces = {name: Piece((name,)) for name in state}
    assert expanded(pieces, same, of_swinv2) == (pieces, [])


CLIP_NAMES = [
    ("blocks.", "transformer.resblocks."),
    ("norm_pre.", "ln_pre."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.weight", ".attn.in_proj_weight"),
    (".attn.qkv.bias", ".attn.in_proj_bias"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("patch_embed.proj.", "conv1."),
]


@pytest.mark.parametrize("openai", [True, False])
def test_clip_without_its_text_tower(openai):
    net = vit(pre_norm_layer=True, patch_bias=False, activation="quick_gelu")
    state = {}
    for name, tensor in renamed(net, CLIP_NAMES).items():
        if name == "cls_token":
            name, tensor = "class_embedding", tensor[0, 0]
        elif name == "pos_embed":
            name, tensor = "positional_embedding", tensor[0]
        elif name.startswith("norm."):
            name = f"ln_post.{name.removeprefix('norm.')}"
        state[f"visual.{name}"] = tensor
    state |= {
        "visual.proj": torch.zeros(8, 4),
        "positional_embedding": torch.zeros(1),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(1),
        "logit_scale": torch.zeros(()),
    }
    if openai:
        state["input_resolution"] = torch.tensor(16)
    check(net, state, "openai_clip" if openai else "open_clip")


@pytest.mark.parametrize("distilled", [False, True])
def test_dino_deit_and_timm_differ_in_wrapping_and_heads(distilled):
    net = vit(distillation_token=distilled)
    heads = {"head.weight": torch.zeros(2, 8), "head.bias": torch.zeros(2)}
    check(net, net.state_dict(), "deit" if distilled else "dino")
    check(net, net.state_dict() | heads, "deit" if distilled else "timm_vit")
    heads |= {"head_dist.weight": torch.zeros(2, 8)}
    check(net, net.state_dict() | heads, "deit", wrapping=("model",))


def test_beit_and_fine_tuned_fd_vits():
    net = vit(**{**STUDENT, "relative_position": "block"})
    state = net.state_dict() | {"fc_norm.weight": torch.zeros(8), "head.bias": torch.zeros(3)}
    check(net, state, "beit")


def test_unknown_names_list_the_known_formats():
    for where in ("weights", "net.pth"):
        with pytest.raises(WeightsError, match=rf"^{where}: .*a\.weight.*OpenAI CLIP") as caught:
            detect(["a.weight"], where=where)
        assert "--" not in str(caught.value)
    with pytest.raises(
        WeightsError, match=r"--teachers\.a\.model timm:.* --teachers\.a\.source mod"
    ):
        detect(["a.weight"], where="--teachers.a.source")
    with pytest.raises(WeightsError, match=r"--student\.model timm:.* --student\.model module:"):
        detect(["a.weight"], where="--student.init")
    with pytest.raises(WeightsError, match="known format"):
        detect(["visual.conv1.weight", "visual.layer1.0.conv1.weight"])  # A CLIP's ResNet.


def test_a_resnet_of_a_clip_is_sent_to_timm():
    names = ["visual.conv1.weight", "visual.attnpool.positional_embedding", "input_resolution"]
    with pytest.raises(WeightsError, match=r"--teacher\.source timm:resnet50_clip"):
        detect(names)


FD_NETS = [
    "fd_swinv2_a",
    "fd_swinv2_b_shared_rpb",
    "fd_swinv2_c_window_shrinks",
    "swinv2_giant_like_a_endnorm",
    "fd_vit_shared_rpb_a",
    "fd_vit_shared_rpb_b_kbias",
    "fd_vit_shared_rpb_c_patch14",
    "fd_vit_block_rpb_ape",
    "fd_vit_no_cls",
]


@pytest.mark.parametrize("name", FD_NETS)
def test_fd_students_beside_their_teacher(name, tmp_path):
    """Under `model`, with decoder, teacher, and a settings object that is not to be run."""
    spec, tensors = oracle(name)
    width = spec["config"]["embed_dim"]
    state = OrderedDict((f"encoder.{n}", t) for n, t in weights_of(tensors).items())
    state |= {
        "decoder.0.weight": torch.zeros(8, width, 1),
        "decoder.0.bias": torch.zeros(8),
        "feature_model.visual.class_embedding": torch.zeros(8),
        "feature_model.visual.conv1.weight": torch.zeros(8, 3, 4, 4),
    }
    settings = argparse.Namespace(lr=1.0, nested=argparse.Namespace(a=[1, 2]))
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "config": settings, "epoch": 3},
        tmp_path / "ckpt.pth",
    )
    given = {}
    if "depths" in spec["config"]:
        # Keys do not tell it where the tables are not in the file.
        given = {"window_size": spec["config"]["window_size"]}
        stages = len(spec["config"]["depths"])
        given["pretrained_window_sizes"] = (0,) * stages
    net, _ = loaded(tmp_path / "ckpt.pth", **given)
    assert_matches(net, spec, tensors, "out.final")


@pytest.mark.parametrize("name", ["fd_training_run_clip_vit", "fd_training_run_esvit_swinv2"])
def test_an_fd_checkpoint_gives_student_projector_and_teacher(name, tmp_path):
    spec, tensors = oracle(name)
    torch.save({"model": weights_of(tensors), "epoch": 1}, tmp_path / "fd.pth")
    student, teacher = spec["config"]["student"], spec["config"]["teacher"]
    swin = "depths" in student
    given = {}
    if swin:
        given = {"window_size": student["window_size"]}
        given["pretrained_window_sizes"] = (0,) * len(student["depths"])
    net, _ = loaded(f"{tmp_path / 'fd.pth'}#student", **given)
    tolerance = 5e-5 if swin else 1e-5
    got = net(tensors["first.input"]).tokens
    expected = tensors["first.student_map"][:1]
    assert max_relative(got, expected) <= tolerance
    projector = opened(f"{tmp_path / 'fd.pth'}#projector")
    found = {n: p.read(projector.file) for n, p in projector.pieces.items()}
    assert found.keys() == {"projection.weight", "projection.bias"}
    decoded = torch.nn.functional.linear(
        expected, found["projection.weight"], found["projection.bias"]
    )
    assert max_relative(decoded, tensors["first.decoded"][:1]) <= 1e-5
    given = {} if swin else {"num_heads": (teacher["heads"],)}
    taught, _ = loaded(f"{tmp_path / 'fd.pth'}#teacher", **given)
    images = tensors["first.input"]
    if not swin:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
        clip_mean, clip_std = (torch.tensor(v).view(1, 3, 1, 1) for v in OPENAI_CLIP)
        images = (images * std + mean - clip_mean) / clip_std
    target = whiten(taught(images).tokens, 1e-5)
    assert max_relative(target, tensors["first.target"][:1]) <= 2e-5


def test_a_projector_is_no_net(tmp_path):
    state = {
        "encoder.blocks.0.attn.q_bias": torch.zeros(1),
        "decoder.0.weight": torch.zeros(2, 1, 1),
    }
    torch.save({"model": state}, tmp_path / "fd.pth")
    assert opened(f"{tmp_path / 'fd.pth'}#projector").pieces.keys() == {"projection.weight"}
    with pytest.raises(WeightsError, match=r"got #teacher.*#projector"):
        opened(f"{tmp_path / 'fd.pth'}#teacher")
