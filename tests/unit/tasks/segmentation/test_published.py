"""Whole segmentation models in the names of mmsegmentation and transformers, both ways."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from card_code import run_code
from safetensors.torch import load_file, save_file
from segmentation_batches import narrow_run
from stored_run import store_tensors
from torch import nn

from fd_large.cli.export import export
from fd_large.engine.zero import partition
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.jobs import job_of
from fd_large.tasks.segmentation.task import Segmentation
from fd_large.weights.resolve import Sources


def swin() -> Run:
    """A Swin of the first version, with the windows of mmsegmentation."""
    run = narrow_run("ade20k_upernet_swinv2_base")
    shape = Architecture(
        embed_dim=8,
        depths=(2, 2, 2, 1),
        num_heads=(1, 1, 2, 2),
        window_size=4,
        image_size=128,
    )
    student = replace(
        run.student, model="swin_base_esvit", architecture=shape, window_rule="official"
    )
    return replace(run, student=student)


def vit(**shape: object) -> Run:
    run = narrow_run("ade20k_upernet_vit_base")
    shape = {"depths": (6,), "patch_size": 16} | shape
    architecture = replace(run.student.architecture, **shape)
    return replace(run, student=replace(run.student, architecture=architecture))


RUNS = {
    "swin": swin,
    "vit": vit,
    "mae": lambda: vit(
        absolute_position=True, relative_position="none", qkv_bias="fused", layer_scale=0.0
    ),
    "shared": lambda: vit(relative_position="shared"),
    "swinv2": lambda: narrow_run("ade20k_upernet_swinv2_base"),
}


def stored(folder: Path, run: Run) -> Segmentation:
    """Writes a run's folder; returns the task that its newest checkpoint holds."""
    task = job_of(run).make_task().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for statistic in partition.running_statistics(task).values():
            statistic.copy_(torch.rand(statistic.shape, generator=generator) + 0.5)
    held = dict(task.named_parameters()) | partition.running_statistics(task)
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(run.to_dict()))
    tensors = {name: tensor.detach() for name, tensor in held.items()}
    store_tensors(folder, tensors, recipe=run.to_dict())
    return task


def started(run: Run, source: Path) -> Segmentation:
    """The task of a run that starts from a file, student and heads."""
    numbers = replace(run.task.segmentation, head_init=str(source))
    run = replace(
        run,
        student=replace(run.student, init=str(source)),
        task=replace(run.task, segmentation=numbers),
    )
    sources = Sources()
    job = job_of(job_of(run).settle(sources))
    job.weights = sources
    task = job.make_task().eval()
    for name, tensors in job.initial_weights().items():
        partition.load_weights(getattr(task, name), tensors, where=name)
    return task


def assert_equal(got: nn.Module, wanted: nn.Module) -> None:
    held = got.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(held[name], tensor), name


def alone(folder: Path) -> Path:
    """The tensors of an export without its config.json."""
    shutil.copy(folder / "model.safetensors", folder.with_suffix(".safetensors"))
    return folder.with_suffix(".safetensors")


@pytest.mark.parametrize(
    ("what", "to"),
    [
        ("swin", "mmseg"),
        ("swin", "upernet"),
        ("vit", "mmseg"),
        ("vit", "upernet"),
        ("swinv2", "mmseg"),
    ],
)
def test_a_file_of_ours_gives_the_same_model_to_the_bit(tmp_path, what, to):
    run = RUNS[what]()
    task = stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), to)
    assert_equal(started(run, tmp_path / "out"), task)
    if to == "mmseg":  # transformers' files need the configuration beside them.
        assert_equal(started(run, alone(tmp_path / "out")), task)


def test_a_vit_is_tested_there_by_the_windows_of_its_run(tmp_path):
    run = RUNS["vit"]()
    stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "mmseg")
    model = json.loads((tmp_path / "out/config.json").read_text())["mmsegmentation"]
    side, stride = run.data.image_size, run.task.segmentation.test_stride
    assert model["test_cfg"] == {
        "mode": "slide",
        "crop_size": [side, side],
        "stride": [stride, stride],
    }


def test_what_a_vit_lacks_is_zeros_and_ones_in_mmsegmentation(tmp_path):
    run = RUNS["mae"]()
    task = stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "mmseg")
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["mmsegmentation"]["backbone"]["type"]
        == "MAE"
    )
    file = load_file(tmp_path / "out/model.safetensors")
    assert not file["backbone.layers.5.attn.relative_position_bias_table"].any()
    assert (file["backbone.layers.5.gamma_2"] == 1).all()
    full = vit(absolute_position=True, qkv_bias="fused")
    got = started(full, alone(tmp_path / "out")).double()
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(got(pixels=pixels), task.double()(pixels=pixels))


@pytest.mark.parametrize(
    ("what", "size"), [("swin", (70, 90)), ("vit", (64, 64)), ("shared", (64, 64))]
)
def test_transformers_gives_the_same_logits_and_its_file_the_same_model(tmp_path, what, size):
    transformers = pytest.importorskip("transformers")
    run = RUNS[what]()
    task = stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "upernet")
    theirs, told = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    missing = {name.rpartition(".")[0] for name in told["missing_keys"]}
    assert all("norm" in name for name in missing), missing  # Counts, and a norm without use.
    assert not any(told[kind] for kind in ("unexpected_keys", "mismatched_keys"))
    seen, _ = run_code((tmp_path / "out/README.md").read_text(), tmp_path / "out", tmp_path)
    assert seen["logits"].shape[:2] == (1, 4)
    theirs.save_pretrained(tmp_path / "theirs")
    if what != "shared":  # The table is copied to every block.
        assert_equal(started(run, tmp_path / "theirs"), task)

    task, theirs = task.double(), theirs.double().eval()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(pixels)
        maps = task.neck(task._maps(pixels, None))
        torch.testing.assert_close(task.head(maps, None), theirs.decode_head(maps))
        second = theirs.auxiliary_head(theirs.backbone(pixels).feature_maps)
        torch.testing.assert_close(task.auxiliary(maps[2]), second)
        logits = F.interpolate(task.head(maps, None), size=size, mode="bilinear")
    torch.testing.assert_close(logits, wanted.logits)


def test_a_training_of_mmsegmentation_is_read(tmp_path):
    """Its file has wrapping, counts and indices, and BEiT's own code the pyramid elsewhere."""
    run = vit()
    task = stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "mmseg")
    held = load_file(tmp_path / "out/model.safetensors")
    held = {
        name.replace("neck.upsample_4x.", "backbone.fpn1.").replace(
            "neck.upsample_2x.", "backbone.fpn2."
        ): tensor
        for name, tensor in held.items()
    }
    held["decode_head.bottleneck.bn.num_batches_tracked"] = torch.tensor(7)
    held["backbone.layers.0.attn.relative_position_index"] = torch.zeros(17, 17).long()
    torch.save({"state_dict": held, "meta": {"epoch": 3}}, tmp_path / "iter_160000.pth")
    assert_equal(started(run, tmp_path / "iter_160000.pth"), task)


def test_other_heads_are_refused(tmp_path):
    run = swin()
    stored(tmp_path / "run", run)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "mmseg")

    def other(**fields: object) -> Run:
        return replace(run, task=replace(run.task, segmentation=replace(own, **fields)))

    own, out = run.task.segmentation, alone(tmp_path / "out")
    with pytest.raises(WeightsError, match=r"head_init.*got 4 .*expected 7"):
        started(other(num_classes=7), out)
    with pytest.raises(WeightsError, match=r"head_init.*head_width"):
        started(other(head_width=16), out)
    held = load_file(out)
    save_file({n: t for n, t in held.items() if "auxiliary" not in n}, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match=r"auxiliary: .*missing.*auxiliary_weight"):
        started(run, tmp_path / "one.safetensors")
    assert started(other(auxiliary_weight=0.0), tmp_path / "one.safetensors").auxiliary is None
    start = {n.removeprefix("backbone."): t for n, t in held.items() if "backbone.st" in n}
    save_file(start, tmp_path / "backbone.safetensors")
    with pytest.raises(WeightsError, match=r"head_init.*segmentation"):
        job_of(other(head_init=str(tmp_path / "backbone.safetensors"))).initial_weights()


@pytest.mark.parametrize(
    ("run", "to", "words"),
    [
        (replace(swin(), student=replace(swin().student, window_rule="masked")), "mmseg", "masked"),
        (RUNS["swinv2"](), "upernet", "a swinv2 model"),
        (vit(depths=(4,)), "mmseg", "four different blocks"),
        (vit(patch_size=8), "upernet", "scales"),
        (narrow_run("ade20k_linear"), "mmseg", "holds UPerNet"),
    ],
)
def test_runs_that_have_no_like_are_refused(tmp_path, run, to, words):
    stored(tmp_path / "run", run)
    with pytest.raises(ConfigError, match=rf"export: --to {to}.*{words}"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), to)
