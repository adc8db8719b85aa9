"""A run's student out, into timm and transformers and back here: the same features."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import timm
import torch
from loading import IMAGES, close, initial, loaded
from safetensors.torch import load_file
from stored_run import STUDENTS, SWIN, VIT, store_student, store_tensors

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.checkpoint import stream
from fd_large.cli import export as command
from fd_large.errors import CheckpointError, ConfigError, WeightsError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.export import export as export_items
from fd_large.weights.export import export_of, parse_size, planned
from fd_large.weights.read import read


@pytest.fixture
def exported(tmp_path):
    """Stores a run of a named model and exports it; returns the model and the folder."""

    def make(what, to, *words, **options):
        name, fields = STUDENTS.get(what, what)
        net = store_student(tmp_path / "run", name, fields, **options)
        export(tmp_path, to, *words)
        return net, tmp_path / "out"

    return make


def export(folder, to, *words):
    arguments = [str(folder / "run"), "--to", to, str(folder / "out"), *words]
    assert command.main(arguments) == 0


def features(net):
    with torch.no_grad():
        found = net.forward_features(IMAGES)
    return found.flatten(1, 2) if found.dim() == 4 else found


@pytest.mark.parametrize("what", STUDENTS)
def test_timm_loads_it(exported, what):
    net, out = exported(what, "timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    close(features(theirs), net(IMAGES).tokens)
    theirs = timm.create_model(f"local-dir:{out}")
    assert theirs.load_state_dict(load_file(out / "model.safetensors")).missing_keys == []


def test_timms_beit_by_name_loads_it(tmp_path):
    fields = {"depths": (1,)}
    run = registry.get("fd_clip_vit_base")
    net = store_student(tmp_path / "run", run.student.model, {**fields, "patch_size": 16})
    export(tmp_path, "timm")
    theirs = timm.create_model(
        "beit_base_patch16_224", img_size=32, depth=1, num_classes=0, global_pool="token"
    ).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    close(features(theirs), net(IMAGES).tokens)


@pytest.mark.parametrize("what", [what for what in STUDENTS if what != "swin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_load_it(exported, what, sharded):
    transformers = pytest.importorskip("transformers")
    net, out = exported(what, "hf", *(["--shard_size", "40KB"] if sharded else []))
    assert (out / "model.safetensors.index.json").exists() == sharded
    make, options = transformers.AutoModel, {}
    if what == "plain vit":  # Its pooler is a head that no student has.
        options = {"add_pooling_layer": False}
    theirs, told = make.from_pretrained(out, output_loading_info=True, **options)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    with torch.no_grad():
        close(theirs(pixel_values=IMAGES).last_hidden_state, net(IMAGES).tokens)


@pytest.mark.parametrize("to", ["timm", "hf", "fd"])
@pytest.mark.parametrize("what", STUDENTS)
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_we_load_it(exported, what, to, size):
    if to == "hf" and what == "swin":
        with pytest.raises(ConfigError, match=r"swin .*--to timm, --to fd, --to onnx or"):
            exported(what, to)
        return
    net, out = exported(what, to, "--shard_size", size)
    again, teacher = loaded(out)
    close(again(IMAGES).tokens, net(IMAGES).tokens)
    if what != "swin":  # Its tables alone tell of it.
        assert teacher.architecture.image_size == 32
    assert teacher.statistics[:3] == (0.485, 0.456, 0.406)
    files = list(out.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "30KB")


def test_a_student_starts_from_it(exported):
    net, out = exported("vit with a shared table", "fd")
    fields = {n: v for n, v in VIT.items() if n != "image_size"}
    again, _ = initial(out, "vit_base_patch16", 32, **fields)
    close(again(IMAGES).tokens, net(IMAGES).tokens)


def test_names_of_feature_distillation(exported):
    _, out = exported("vit with a shared table", "fd")
    found = read(out)
    assert "encoder.rel_pos_bias.relative_position_bias_table" in found
    assert found.shape("decoder.0.weight") == (6, 32, 1)
    assert found.shape("decoder.0.bias") == (6,)


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({"extra_norm_every": 2}, {}, "extra_norm_every 2"),
        ({"shared_position_bias": True}, {}, "shared position bias"),
        ({"window_size": 3}, {"size_rule": "pad"}, "size_rule pad"),
        ({}, {"size_rule": "pad", "window_rule": "official"}, "window_rule official"),
    ],
)
def test_what_the_others_have_not(tmp_path, fields, options, words):
    net = store_student(tmp_path / "run", "swinv2_base", {**SWIN, **fields}, **options)
    for to in ("timm", "hf"):
        with pytest.raises(ConfigError, match=rf"{words}.*--to fd, --to onnx or "):
            export(tmp_path, to)
    export(tmp_path, "fd")
    if not options:
        again, _ = loaded(tmp_path / "out")
        close(again(IMAGES).tokens, net(IMAGES).tokens)
    names = list(read(tmp_path / "out"))
    extra = [name for name in names if "extra_norm" in name]
    assert bool(extra) == ("extra_norm_every" in fields)
    # What Feature-Distillation has goes out in its names, G's norms in the official ones.
    assert ("layers.0.blocks.0.norm1.weight" in names) == bool(extra)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_base_patch16", {"qkv_bias": "qkv"}),
        ("dino_vit_base_patch16", {"layer_scale": 0.1}),
        ("dino_vit_base_patch16", {"absolute_position": False}),
        ("clip_vit_base_patch16", {}),
    ],
)
def test_vits_that_transformers_has_not(tmp_path, name, fields):
    store_student(tmp_path / "run", name, {**VIT, **fields})
    with pytest.raises(ConfigError, match="another design"):
        export(tmp_path, "hf")


def test_one_tensor_at_a_time(tmp_path):
    """The next tensor is asked for when the last one is on disk and gone."""
    net = build("vit_base_patch16", Architecture(**VIT, image_size=32), seed=0)
    shapes = {name: tuple(t.shape) for name, t in net.named_parameters()}
    alive = []

    def items():
        for name, tensor in net.named_parameters():
            given = tensor.detach().clone()
            alive.append(weakref.ref(given))
            yield name, given
            del given
            # A generator that renames, and one that writes, may hold the last one yet.
            assert sum(reference() is not None for reference in alive) <= 1

    architecture = resolve("vit_base_patch16", Architecture(**VIT, image_size=32))
    files = export_items(
        items(),
        shapes,
        architecture,
        export_of(architecture, "timm", pads=False),
        tmp_path / "out",
        statistics=IMAGENET,
        shard_size=10**6,
        card="",
    )
    assert len(alive) == len(shapes)
    assert len(files) == 1


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_a_model_without_positions_for_images_of_another_size(exported, to):
    net, out = exported("swinv2 of two stages", to, "--image_size", "48")
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        if to == "timm":
            tokens = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            tokens = tokens.forward_features(images).flatten(1, 2)
        else:
            transformers = pytest.importorskip("transformers")
            tokens = transformers.AutoModel.from_pretrained(out)(images).last_hidden_state
    close(tokens, net(images).tokens)


def test_positions_are_made_for_one_size(exported):
    with pytest.raises(ConfigError, match=r"--image_size: .*got 64, .*32"):
        exported("plain vit", "timm", "--image_size", "64")


def test_what_stands_there_stays(tmp_path):
    store_student(tmp_path / "run", "vit_base_patch16", VIT)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"^export: .*out: .*already"):
        export(tmp_path, "timm")


def test_a_nan_is_not_exported(tmp_path):
    net = store_student(tmp_path / "run", "vit_base_patch16", VIT)
    tensors = {f"student.{n}": t.detach().clone() for n, t in net.named_parameters()}
    tensors["student.norm.bias"][0] = torch.nan
    tensors |= {"projection.weight": torch.zeros(6, 32), "projection.bias": torch.zeros(6)}
    store_tensors(tmp_path / "run", tensors, update=4)
    with pytest.raises(WeightsError, match=r"norm\.bias"):
        export(tmp_path, "timm")
    assert not list(tmp_path.glob("out*"))


def test_a_run_that_trains_on_prunes_what_is_exported(tmp_path, monkeypatch, caplog):
    """The newest checkpoint goes while it is read: the one that took its place goes out."""
    net = store_student(tmp_path / "run", "vit_base_patch16", VIT)
    tensors = {f"student.{n}": t.detach() for n, t in net.named_parameters()}
    tensors |= {"projection.weight": torch.zeros(6, 32), "projection.bias": torch.zeros(6)}
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    newest = stream.newest

    def pruned(folder, **options):
        reader = newest(folder, **options)
        if reader.manifest["update"] == 3:
            store_tensors(folder, tensors, update=4, recipe=recipe)
            shutil.rmtree(reader.path)
        return reader

    monkeypatch.setattr(stream, "newest", pruned)
    export(tmp_path, "timm")
    assert "step_00000003: a file has disappeared" in caplog.text
    assert "| steps | 4 " in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_that_goes_and_leaves_none(tmp_path, monkeypatch):
    store_student(tmp_path / "run", "vit_base_patch16", VIT)
    read = stream.read

    def gone(reader, *arguments, **named):
        shutil.rmtree(reader.path, ignore_errors=True)
        return read(reader, *arguments, **named)

    monkeypatch.setattr(stream, "read", gone)
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        export(tmp_path, "timm")


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"without recipe\.json"):
        export(tmp_path, "timm")


def test_sizes():
    assert [parse_size(t) for t in ("5GB", "300 MB", "80kb", "1.5GB", "12")] == [
        5 * 10**9,
        300 * 10**6,
        80_000,
        1_500_000_000,
        12,
    ]
    for text in ("", "much", "0", "-5GB", "5PB", "9" * 400):
        with pytest.raises(ConfigError, match="shard_size"):
            parse_size(text)
    files = planned([("a", (3,)), ("b", (2,)), ("c", (100,)), ("d", ())], 20)
    assert [list(file) for file in files] == [["a", "b"], ["c"], ["d"]]
