"""The package on a card that is not here (fake_cuda.py): where each tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import detection_batches
import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from fake_cuda import Card, fake_cuda, on_card
from PIL import Image
from tiny_timm import tiny

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.bad_images import BadCount, BadImages
from fd_large.data.centre_crops import NO_LABEL
from fd_large.data.labelled import LabelledImages, open_labelled
from fd_large.data.loader import Batch
from fd_large.data.photographs import Photographs
from fd_large.data.views import ViewSettings
from fd_large.engine import ema, forward_backward
from fd_large.engine.incident_evidence import evidence_of
from fd_large.engine.loop import Trainer, TrainingPlan
from fd_large.engine.replay import replay
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.student import make_student
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.engine import Engine
from fd_large.evaluation.diagnosis.examine import Extent, examine
from fd_large.evaluation.diagnosis.models import load_model
from fd_large.evaluation.diagnosis.sample import Sample
from fd_large.probes import knn, linear
from fd_large.probes.features import Features, extract
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.fields import override
from fd_large.recipes.sections import Student
from fd_large.tasks.classification.job import FineTuningJob
from fd_large.tasks.classification.task import FineTuning
from fd_large.tasks.detection.job import DetectionJob
from fd_large.tasks.detection.scores.collect import to_results
from fd_large.tasks.detection.stored import StoredDetection
from fd_large.tasks.distillation.canary import seconds_of_product
from fd_large.tasks.distillation.held_out import Crops, HeldOutViews
from fd_large.tasks.distillation.job import KNOWN, DistillationJob
from fd_large.tasks.distillation.normalisers import NORMALISERS
from fd_large.tasks.distillation.section import Mask
from fd_large.tasks.jobs import job_of

SIDE = 32
# As narrow as the fused kernels take.
VIT = Architecture(embed_dim=32, depths=(2,), num_heads=(2,), patch_size=8, image_size=SIDE)
SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=2, patch_size=4, image_size=SIDE
)
NO_MASK = Mask()
STUDENTS = {
    "vit_base_patch16": VIT,
    "swin_base_esvit": SWIN,
    "swinv2_tiny": SWIN,
    f"timm:{tiny('convnextv2_atto')}": Architecture(image_size=SIDE),
}
DETECTORS = ("coco_mask_rcnn_swinv2_giant", "coco_mask_rcnn_vit_base")
KERNELS = {"reference": (7, 5), "triton": (9, 0)}
"""What runs the fused operations, and the compute capability that makes it do so."""
COUNTING = {
    *("matching.match", "matching.sample", "pooling._places_by_level", "mask_head.cut_masks"),
    # torchvision's coder moves its constants, too.
    *("rpn.propose", "rpn.rpn_terms", "box_head.box_losses"),
}
"""Functions of a detector that must know how many boxes there are."""


def batch_of(size: int = 2, side: int = 32, targets=None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(images, 0, torch.arange(size), torch.arange(size), targets=targets)


def test_the_card_refuses_what_a_card_refuses(card: Card) -> None:
    there, here = on_card(torch.ones(2, 3)), torch.ones(2, 3)
    assert there.device == torch.device("cuda:0")
    assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 2
    for mixed in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.stack([there[0, 0], here[0, 0]]),
        lambda: torch.nn.functional.linear(there, here),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    with pytest.raises(RuntimeError, match="one type"):
        torch.nn.functional.layer_norm(
            there.bfloat16(), (3,), torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        )


def engine_ready(make: Callable[[], Task], *, bfloat16: bool = True) -> Task:
    """Builds a task and does to it what `build_engine` does before it calls DeepSpeed."""
    task = partition.build(make, {}, partitioned=False, seed=0)
    if bfloat16:
        partition.to_bfloat16(task)
    return task.to(distributed.device())


def step(task: Task, batch: Batch) -> torch.Tensor:
    """A micro batch as the engine would run it; returns the loss."""
    loss, _ = task.train()(**forward_backward.prepared(task, batch, seed=0))
    loss.backward()
    return loss


def gradients_are_there(task: Task) -> None:
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == torch.device("cuda:0"), name
        assert parameter.grad.dtype == parameter.dtype == torch.bfloat16, name


def distilling(
    name: str, *, teacher_stream: bool = False, mask: Mask = NO_MASK, **changes: object
) -> Task:
    """A tiny distillation of a student, as a run on this machine builds it."""
    run = override(tiny_runs.tiny_run(), {"task.distillation.teacher_stream": teacher_stream})
    student = replace(run.student, model=name, architecture=STUDENTS[name], drop_path_rate=0.3)
    # Numbers, as in a recipe that is settled: what is automatic is found before models are built.
    how = {"interpolation": "bilinear", "teacher_image_size": 0, **changes}
    objective = replace(run.objective, **how)
    job = DistillationJob(replace(run, student=student, objective=objective, mask=mask))
    job.build(bfloat16=True, node_size=1, persistence_threshold=0)
    return engine_ready(job.make_task)


def test_the_card_computes_what_the_cpu_computes() -> None:
    expected = step(distilling("swinv2_tiny"), batch_of())
    with fake_cuda() as card:
        card.capability = KERNELS["reference"]
        found = step(distilling("swinv2_tiny"), batch_of())
        assert found.device == torch.device("cuda:0")
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", STUDENTS)
def test_distillation(card: Card, name: str, kernels: str) -> None:
    card.capability = KERNELS[kernels]
    task = distilling(name)
    step(task, batch_of())  # What is made once, the host may wait for.
    with card.waiting() as waits:
        loss = step(task, batch_of())
    assert waits == []
    assert loss.isfinite()
    gradients_are_there(task)
    # A model of timm's calls no operation that has kernels of ours.
    assert bool(card.fused) == (kernels == "triton" and not name.startswith("timm:"))


@pytest.mark.parametrize(
    "mask",
    [
        Mask(sampler="block", min_patches=2),
        Mask(sampler="random", student="dropped", tokens="visible", cls=True),
        Mask(sampler="random", student="dropped", decoder_width=32, decoder_depth=1),
    ],
    ids=["block", "visible", "decoder"],
)
def test_masked_distillation(card: Card, mask: Mask) -> None:
    card.capability = KERNELS["reference"]
    task = distilling("vit_base_patch16", mask=mask)
    step(task, batch_of())
    with card.waiting() as waits:
        loss = step(task, batch_of())
    assert waits == []
    assert loss.isfinite()
    gradients_are_there(task)


def test_teachers_on_their_own_stream_are_waited_for_after_the_student(card: Card) -> None:
    card.capability = KERNELS["reference"]
    expected = step(distilling("swinv2_tiny"), batch_of())
    task = distilling("swinv2_tiny", teacher_stream=True)
    task.student.register_forward_hook(lambda *_: card.notes.append("student"))
    assert card.notes == []
    assert step(task, batch_of()).item() == expected.item()
    assert card.notes == [
        *("side waits for main", "record_stream side"),
        *("student", "main waits for side", "record_stream main"),
    ]
    # Evaluations, which wait for their numbers anyway, have no other stream.
    task.eval()(**forward_backward.prepared(task, batch_of(), seed=0))
    assert card.notes[5:] == ["student"]


@pytest.mark.parametrize("name", STUDENTS)
def test_fine_tuning(card: Card, name: str) -> None:
    student = Student(model=name, architecture=STUDENTS[name], drop_path_rate=0.3)
    # Running statistics come with weights, which no test loads here.
    task = engine_ready(
        lambda: FineTuning(make_student(student, image_size=SIDE), 4, statistics=IMAGENET)
    )
    batch = batch_of(targets=torch.full((2, 4), 0.25))
    step(task, batch)
    with card.waiting() as waits:
        loss = step(task, batch)
    assert waits == []
    assert loss.isfinite()
    gradients_are_there(task)
    task.eval()
    with card.waiting() as waits, torch.no_grad():
        labels = torch.tensor([1, NO_LABEL], device="cuda:0")
        task(**task.prepare(batch.images.to("cuda"), labels, None))
    assert waits == ["test: copy from the CPU"] * 2


@pytest.mark.parametrize("recipe", DETECTORS)
def test_detection(card: Card, recipe: str) -> None:
    task = engine_ready(DetectionJob(detection_batches.narrow_run(recipe)).make_task)
    batch = detection_batches.batch_of(0, (83, 67), [3, 0])
    step(task, batch)
    with card.waiting() as waits:
        on_device = forward_backward.prepared(task.train(), batch, seed=0)
    assert waits == []
    with card.waiting() as waits:
        loss, _ = task(**on_device)
        loss.backward()
    assert loss.isfinite()
    gradients_are_there(task)
    # How many boxes there are depends on the images, so that the host must know them; nothing
    # else may wait.
    asking = {wait.partition(":")[0] for wait in waits}
    assert asking <= COUNTING, waits
    task.eval()
    seen = task.see(batch.images.to("cuda"), batch.targets.sizes.to("cuda"))
    assert {tensor.device.type for found in seen for tensor in found} == {"cuda"}
    results = to_results(
        seen[0], image_id=0, category_ids=range(9), original_size=batch.targets.sizes[0]
    )
    assert len(results) == len(seen[0].boxes)


def test_a_detector_s_pictures(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = detection_batches.narrow_run(DETECTORS[1])
    job = DetectionJob(run)
    stored, task = StoredDetection(job), engine_ready(job.make_task)
    monkeypatch.setattr(stored, "task", lambda reader: task.eval())
    reader = SimpleNamespace(manifest={"categories": dict(enumerate("abcde"))})
    image = tmp_path / "a.png"
    Image.new("RGB", (90, 60)).save(image)
    (found,) = stored.predict(reader, [str(image)], tmp_path / "out", least_score=0.5)
    assert not found.problem


def test_held_out_views(card: Card) -> None:
    task = distilling("swinv2_tiny")
    engine = Engine(task, task, 0, {}, None, {})
    crops = Crops(Photographs(held_out=True), 3, ViewSettings(SIDE, 0.5), seed=0)
    views = HeldOutViews("held_out", crops, micro_batch_size=2)
    with card.waiting() as waits:
        found = views.measure(engine, lambda: None)
    assert found.keys() == {"held_out_loss", "held_out_cosine"}
    # The images of each batch go there, and all numbers come back at once.
    assert sum("copy to the CPU" in wait for wait in waits) == 1, waits
    assert views.best_constant(engine, lambda: None)["held_out_best_constant"] > 0
    panel = views.panel(engine)
    assert {value.dtype.name for value in panel.values()} == {"uint8", "float32"}


def test_a_step_reads_the_device_once(card: Card) -> None:
    optimizer = SimpleNamespace(_global_grad_norm=on_card(torch.tensor(2.0)))
    trainer = Trainer(
        Engine(SimpleNamespace(optimizer=optimizer), torch.nn.Identity(), 0, {}, None, {}),
        TrainingPlan(CosineSchedule(1e-3, 0.0, 0.0, 10, 0), 10, 2, 0),
        [],
        SimpleNamespace(first_update=0),
        checkpoints=SimpleNamespace(flags=(False,) * 3, bad_images=BadCount(0, 0)),
    )
    losses = [on_card(torch.tensor(1.0)), on_card(torch.tensor(3.0))]
    with card.waiting() as waits:
        agreed = trainer._agree(losses, 0, 1e-3, None)
    assert waits == ["loop._agree: copy to the CPU"]
    assert (agreed.update.loss, agreed.update.grad_norm) == (2.0, 2.0)


def labelled(folder: Path) -> LabelledImages:
    """Three images of two classes."""
    for number in range(3):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 60 * number, dtype=np.uint8)).save(path)
    return open_labelled(str(folder / "images"))


def test_accuracy_on_test_images(card: Card, monkeypatch, tmp_path: Path) -> None:
    images = labelled(tmp_path)
    run = registry.get("finetune_clip_vit_base")
    data = replace(run.data, image_size=SIDE, workers=0)
    job = FineTuningJob(replace(run, data=data))
    student = Student(model="swinv2_tiny", architecture=SWIN)
    task = engine_ready(lambda: FineTuning(make_student(student), 2, statistics=IMAGENET))
    found, predictions = job._measure(
        Engine(task, task, 0, {"bf16": {"enabled": False}}, None, {}),
        images,
        BadImages(),
        2,
        lambda: None,
    )
    assert found.keys() == {"loss", "top1", "top5"}
    assert found["top5"] == 100
    right = predictions.predicted == predictions.labels
    assert found["top1"] == pytest.approx(100 * right.mean())


def test_nearest_neighbours_and_a_linear_probe(card: Card, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    rows = (rng.normal(size=(60, 8)) + 4 * np.eye(8)[labels]).astype(np.float32)
    features = Features(rows, labels)
    assert features.percent(knn.classify(features, features, num_classes=3, k=3)) > 90
    probe = linear.Probe(rates=(0.1, 1.0), epochs=2, batch_size=16)
    outcome = linear.evaluate(features, features, num_classes=3, probe=probe)
    assert features.percent(outcome.predicted) > 90


def test_features_of_labelled_images(card: Card, tmp_path: Path) -> None:
    net = build("vit_base_patch16", VIT).eval().bfloat16().to("cuda")
    (found,) = extract(
        lambda pixels: net(pixels.bfloat16()),
        IMAGENET,
        labelled(tmp_path),
        tmp_path / "features",
        image_size=SIDE,
        batch_size=2,
    )
    assert np.isfinite(found.rows).all()
    assert found.rows.shape == (3, VIT.embed_dim)


def test_the_evidence_of_a_refused_step(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    task = distilling("swinv2_tiny").train()
    state = [("master.w", on_card(torch.ones(2))), ("ema.w", on_card(torch.tensor([1.0, np.nan])))]
    monkeypatch.setattr(ema.state, "shards", lambda engine: state)
    found = evidence_of(
        Engine(task, task, 0, {}, None, {}), [batch_of(), batch_of()], [1.0, 2.0], 0
    )
    assert all(np.isfinite(value) for value in found.maxima.values())
    assert found.not_finite == ["ema.w"]
    # What a thread writes to a file lies in host memory.
    on_host = [*found.images, found.positions, found.indices]
    assert {tensor.device.type for tensor in on_host} == {"cpu"}


def test_the_average_of_the_weights(card: Card, monkeypatch) -> None:
    owner, kept = on_card(torch.ones(4)), {}
    monkeypatch.setattr(ema.state, "owned", lambda engine: [("w", owner, 0, 4)])
    monkeypatch.setattr(ema.state, "optimizer_state", lambda optimizer, owner: kept)
    monkeypatch.setattr(ema.state, "redistribute", lambda engine: None)
    task = torch.nn.Identity()
    engine = SimpleNamespace(gate=SimpleNamespace(inner=None), disk=None, task=task, averages={})
    average = ema.Ema(engine, 0.75)
    owner.add_(4)
    with card.waiting() as waits:
        average.update()
        with average.in_place_of_weights():
            pass
    assert waits == []
    assert kept[ema.state.EMA].tolist() == [2.0] * 4
    assert owner.tolist() == [5.0] * 4


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("loss", [*(name for name in KNOWN.losses if name != "queue"), "cosine"])
def test_losses_and_normalisers(card: Card, monkeypatch, normaliser: str, loss: str) -> None:
    own = lambda projected, target: 1 - F.cosine_similarity(projected, target, dim=-1).mean()  # noqa: E731
    monkeypatch.setitem(KNOWN.losses, "cosine", own)
    task = distilling("vit_base_patch16", loss=loss, normaliser=normaliser)
    step(task, batch_of())
    with card.waiting() as waits:
        found = step(task, batch_of())
    assert waits == []
    assert found.isfinite()
    gradients_are_there(task)


def test_the_canary(card: Card, monkeypatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda a, b: None)  # 4096^3 is nothing for a CPU.
    assert seconds_of_product() > 0
    assert card.notes == ["synchronize"] * 14
    teacher = distilling("vit_base_patch16").teachers.by_name[""]
    assert teacher.map_of_fixed_images(SIDE).device.type == "cuda"
    assert teacher.hash_now() == teacher.fingerprint
    assert teacher.shard_hash() == teacher.shard_hash()


def test_a_diagnosis(card: Card, distillation, tmp_path: Path) -> None:
    folder, *_ = distillation
    sample = Sample("builtin:photographs", 4)
    models = [load_model(str(folder), sample), load_model("timm:test_vit=random", sample)]
    found = examine(
        models,
        sample,
        batch_size=4,
        extent=Extent(points=3, seeds=1, side=3),
        progress=lambda what: None,
    )
    assert len(found.models) == 2


@pytest.mark.parametrize("checkpointing", ["off", "every"])
def test_a_refused_step_is_run_again(card: Card, tmp_path: Path, checkpointing: str) -> None:
    run = tiny_runs.tiny_run()
    student = replace(run.student, drop_path_rate=0.5, activation_checkpointing=checkpointing)
    run = replace(run, student=student)
    tiny_runs.store_task(tmp_path, run, tiny_runs.tiny_task(run), update=3)
    (tmp_path / "deepspeed.json").write_text('{"bf16": {"enabled": true}}')
    images = list(batch_of(4).images.split(2))
    file = tiny_runs.store_incident(tmp_path, 4, images, [0.5, 0.25])
    replayed = replay(file, job_of)
    assert all(np.isfinite([*replayed.losses, replayed.grad_norm]))
