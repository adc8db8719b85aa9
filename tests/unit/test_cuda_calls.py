"""What only a GPU's rank calls, against stand-ins of torch.cuda (fake_cuda.py)."""

from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from fake_cuda import GB, Card, is_pinned, on_card
from pretended_ranks import World
from safetensors.torch import load_file
from torch import nn

from fd_large.checkpoint.write import Piece, Saver
from fd_large.cli import doctor, doctor_checks, plan_probe
from fd_large.data.loader import Batch, load_batches
from fd_large.engine import memory, opening
from fd_large.engine.counting import count, micro_batch, phases, rates
from fd_large.engine.prefetch import Prefetch
from fd_large.engine.zero import config, engine, optimizer
from fd_large.errors import LaunchError
from fd_large.evaluation import results
from fd_large.evaluation.diagnosis.protocol import device_name
from fd_large.kernels import operation
from fd_large.ranks import distributed, meeting
from fd_large.ranks.launch import Launch
from fd_large.recipes.sections import Optim
from fd_large.runtime.meter import Meter, peak_memory_bytes
from fd_large.tasks.distillation.job import DistillationJob


def rank_of(local_rank: int) -> Launch:
    return Launch(
        launcher="python",
        rank=local_rank,
        world_size=2,
        local_rank=local_rank,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=1,
    )


# --- ranks ---


def test_a_rank_takes_its_own_gpu_and_nccl(card: Card, monkeypatch) -> None:
    called = []
    monkeypatch.setattr(distributed, "_launch", None)
    monkeypatch.setattr(distributed, "watch_launcher", lambda *_: None)
    # Its thread would miss the other rank.
    monkeypatch.setattr(distributed.failures, "watch", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_store_of_group", lambda *_: None)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **_: called.append(backend)
    )
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(LaunchError, match=r"CUDA_DEVICE_MAX_CONNECTIONS.* got 1"):
        distributed.start(rank_of(0))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with pytest.raises(LaunchError, match=r"local rank 1 .*got 1 .*expected 2"):
        distributed.start(rank_of(1))
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "the user has set it"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert distributed.start(rank_of(0)) == rank_of(0)
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    assert called == ["cpu:gloo,cuda:nccl"]
    assert card.notes == ["set_device"]
    assert distributed.device() == torch.device("cuda:0")
    assert config.computes_in_bfloat16("auto")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "barrier", lambda **given: called.append(given))
    distributed.barrier()
    assert called[1:] == [{"device_ids": [0]}]


def test_a_check_beside_meetings_has_its_rank_s_gpu(card: Card, monkeypatch) -> None:
    world = World(monkeypatch, 2)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    assert world.run(lambda: meeting.meet(lambda: list(card.notes)))[0][:1] == ["set_device"]


def test_the_doctor_s_ranks_meet_over_nccl(card: Card, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_MESSAGE_BYTES", 64)
    assert "NCCL all-reduces" in doctor._sum(0.0).found


# --- the optimiser and the blocks ---


def test_a_task_is_built_on_the_gpu_with_an_optimiser_for_it(card: Card, monkeypatch) -> None:
    asked, given = {}, {}

    def initialize(**made):
        given.update(made)
        return SimpleNamespace(destroy=lambda: None, optimizer=None), None, None, None

    monkeypatch.setattr(engine, "deepspeed", SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(engine, "check_optimizer", lambda *made: None)
    monkeypatch.setattr(engine, "spare_passes", lambda made, bucket: None)
    monkeypatch.setattr(
        engine.partition, "set_masters", lambda task, exact: given.update(exact=exact)
    )
    make = engine.make_optimizer

    def noted(groups, optim, **how):
        asked.update(how)
        return make(groups, Optim(fused="torch"), **how)

    monkeypatch.setattr(engine, "make_optimizer", noted)
    job = DistillationJob(tiny_runs.tiny_run())
    job.build(bfloat16=True, node_size=1, persistence_threshold=0)
    zero: dict = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    for offload, on_gpu in ((None, True), ({"device": "cpu"}, False)):
        if offload:
            zero["zero_optimization"]["offload_optimizer"] = offload
        engine.build_engine(job.make_task, zero, optim=Optim(), seed=0)
        assert asked["on_gpu"] is on_gpu
    parameters = list(given["model"].parameters())
    assert {(p.device.type, p.dtype) for p in parameters} == {("cuda", torch.bfloat16)}
    assert {value.dtype for value in given["exact"].values()} == {torch.float32}


def test_torch_s_fused_kernel_steps_on_the_gpu(card: Card) -> None:
    weight = nn.Parameter(on_card(torch.ones(2, 2)))
    made = optimizer.make_optimizer(
        [{"params": [weight], "weight_decay": 0.0}], Optim(fused="torch"), on_gpu=True
    )
    weight.grad = torch.ones_like(weight)
    optimizer.set_learning_rate(made, 0.5)
    with card.waiting() as waits:
        made.step()
    assert waits == []
    assert weight.tolist() == [[pytest.approx(0.5)] * 2] * 2


def test_an_optimiser_of_the_user_s_own_is_tried_on_the_gpu(card: Card, monkeypatch) -> None:
    tried_on = []

    def sgd(groups, lr):
        tried_on.append(groups[0]["params"][0].device.type)
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)

    monkeypatch.setitem(optimizer.OPTIMISERS, "sgd", sgd)
    made = optimizer.make_optimizer(groups(), Optim(name="sgd"), on_gpu=True)
    assert optimizer.kept_by(made).moments == {"momentum_buffer": 0.0}
    assert set(tried_on[:-1]) == {"cuda"}


def groups() -> list[dict]:
    return [{"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.0}]


def test_deepspeed_s_kernel_is_first_and_torch_s_last(card: Card, monkeypatch) -> None:
    class FusedAdam(torch.optim.Adam):
        def __init__(self, groups, *, adam_w_mode, **settings):
            assert adam_w_mode
            super().__init__(groups, decoupled_weight_decay=True, **settings)

    problems: list[str | None] = [None, "no nvcc"]
    monkeypatch.setattr(optimizer.deepspeed.ops.adam, "FusedAdam", FusedAdam)
    monkeypatch.setattr(optimizer.compiled_ops, "load", lambda name: problems.pop(0))
    made = optimizer.make_optimizer(groups(), Optim(), on_gpu=True)
    assert isinstance(made, FusedAdam)
    assert optimizer.kept_by(made).moments == {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    made = optimizer.make_optimizer(groups(), Optim(), on_gpu=True)
    assert isinstance(made, torch.optim.AdamW)
    owner = on_card(torch.ones(2))
    assert optimizer.kept_by(made).count(owner, 3).device.type == "cuda"


def test_a_kernel_is_launched_on_its_tensors_device(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(
        operation,
        "function_of",
        lambda name: {(2,): lambda *given, **constants: started.append((card.notes[:], constants))},
    )
    operation.launch("a_triton.kernel", (2,), None, on_card(torch.ones(1)), 3, C=8)
    assert started == [(["device cuda:0"], {"C": 8})]


# --- memory ---


def test_the_memory_of_a_gpu(card: Card) -> None:
    gpu = memory.GpuMemory()
    gpu.reset()
    assert card.notes == ["empty_cache", "reset_peak_memory_stats"]
    assert gpu.peak() == card.peak
    assert card.notes[2:] == ["synchronize"]
    assert gpu.capacity() == card.free + card.reserved
    assert peak_memory_bytes() == card.peak


def test_the_probe_of_a_gpu_frees_what_it_took(card: Card, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(micro_batch, "backward", lambda engine, arguments: None)
    monkeypatch.setattr(micro_batch, "arguments_of_step", lambda *_, **__: (each for each in [{}]))
    task = nn.Identity()
    task.student_norms = list
    thrown_away = SimpleNamespace(
        deepspeed=SimpleNamespace(step=lambda: None, destroy=lambda: None), task=task
    )
    monkeypatch.setattr(opening, "engine_of", lambda *_, **__: thrown_away)
    numbers = config.RunNumbers(1, 4, 1, 1, 1.0, True, (8,))
    filled = config.fill({"zero_optimization": {"stage": 1}}, numbers)
    checked = opening.Checked(DistillationJob(tiny_runs.tiny_run()), [], numbers, filled)

    def found() -> int:
        (probed,) = opening._with_probed_micro_batch([checked], tmp_path, keep=True)
        return probed.config[config.MICRO_BATCH]

    assert found() == 4
    assert card.notes[-1] == "empty_cache"
    card.notes.clear()
    assert found() == 4
    assert card.notes == [], "remembered"


def test_out_of_memory_on_a_gpu(card: Card) -> None:
    with (
        pytest.raises(memory.OutOfMemory, match="models are built"),
        memory.building_in_memory(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# --- copies ---


def test_batches_are_pinned_and_copied_beside(card: Card, monkeypatch) -> None:
    # What DataLoader asks before it pins.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)

    class Batches(torch.utils.data.Dataset):
        def __getitem__(self, positions):
            images = torch.full((1, 3, 200, 200), positions[0], dtype=torch.uint8)
            return Batch(images, 0, torch.tensor(positions), torch.tensor(positions))

    loader = load_batches(Batches(), [[0], [1], [2]], workers=0)
    assert loader.pin_memory
    batches = Prefetch(iter(loader), distributed.device())
    with card.waiting() as waits:
        for number, (batch, copy) in enumerate(batches):
            assert is_pinned(batch.images)
            assert copy.images.device.type == "cuda"
            assert copy.positions.device.type == "cpu"
            assert copy.images[0, 0, 0, 0] == number
            batches.stage()
    assert [wait for wait in waits if not wait.startswith("test")] == []
    assert card.notes[:2] == ["main waits for side", "record_stream main"]


def test_a_checkpoint_is_copied_to_pinned_memory(card: Card, tmp_path) -> None:
    state = {"master.w": on_card(torch.arange(4.0)), "ema.w": torch.ones(1)}
    writer = Saver(tmp_path, keep_last=1, keep_every=0)
    writer.begin({"update": 1}, [Piece(*of) for of in state.items()])
    writer.wait()
    assert not writer.failed
    assert is_pinned(writer._buffer)
    # A copy that nobody waits for arrives after the thread has written.
    (file,) = tmp_path.rglob("rank_00000.safetensors")
    written = load_file(file)
    assert {name: written[name].tolist() for name in state} == {
        "master.w": [0, 1, 2, 3],
        "ema.w": [1],
    }
    writer.finish(failed_anywhere=True)


def test_a_copy_without_a_wait_arrives_when_somebody_waits(card: Card) -> None:
    """What the card of the tests does, so that one that is read too early shows."""
    there, held = on_card(torch.ones(2)), torch.zeros(4).pin_memory()
    held[2:].copy_(there, non_blocking=True)
    beside = there.to("cpu", non_blocking=True)
    assert [held.sum(), beside.sum()] == [0, 0]
    torch.cuda.synchronize()
    assert [held.tolist(), beside.tolist()] == [[0, 0, 1, 1], [1, 1]]
    torch.zeros(2).copy_(there, non_blocking=True)  # Pageable memory is waited for.
    assert card.late == []


# --- what is measured and said of a card ---


def test_utilisation_is_of_this_card(card: Card, make_setting, tmp_path) -> None:
    meter = Meter()
    meter.on_start(make_setting())
    assert meter._peak == 989e12
    meter.on_end("done")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["device"], summary["peak_memory_bytes"]) == ("cuda", card.peak)


def test_flops_are_counted_as_this_card_runs_them(card: Card, monkeypatch) -> None:
    stood_for = []
    on_shapes = count.on_shapes
    monkeypatch.setattr(
        count, "on_shapes", lambda device: stood_for.append(device) or on_shapes(device)
    )
    card.capability = (7, 5)
    assert count.step_flops(DistillationJob(tiny_runs.tiny_run()), 2, checkpointing=False)
    assert [device.capability for device in stood_for] == [(7, 5)]


def test_rates_are_measured_on_the_gpu(card: Card, monkeypatch) -> None:
    monkeypatch.setattr(rates.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(
        rates.dist, "all_gather_object", lambda everyone, found: everyone.__setitem__(0, found)
    )
    for name in ("COPY_ELEMENTS", "SIDE_ON_GPU", "PASSES"):
        monkeypatch.setattr(rates, name, 1)
    found = rates.measure()
    assert found["name"] == "NVIDIA H100 80GB HBM3, measured"
    assert found["capability"] == "9.0"
    assert found["memory_bytes"] == 80 * GB
    assert found["peak"] == 989e12
    assert "synchronize" in card.notes


def test_the_probe_s_ranks_meet_and_measure(card: Card, monkeypatch, tmp_path) -> None:
    called = []
    monkeypatch.setattr(distributed, "start", called.append)
    monkeypatch.setattr(distributed, "stop", lambda: called.append("left"))
    monkeypatch.setattr(rates, "measure", lambda: {"matmul": 1.0})
    monkeypatch.setattr(phases, "UPDATED", 1000)
    # DeepSpeed would compile its kernel for this machine's CPU, which cannot read the card.
    monkeypatch.setattr(optimizer.compiled_ops, "load", lambda name: "no nvcc")
    out = tmp_path / "rates.json"
    asked = {"runs": [tiny_runs.tiny_run().to_dict()], "out": str(out), "code": {}}
    monkeypatch.setattr(plan_probe.sys, "stdin", io.StringIO(json.dumps(asked)))
    plan_probe.main(0, 1, 7)
    launch, left = called
    assert (launch.rank, launch.world_size, launch.master_port) == (0, 1, 7)
    assert left == "left"
    assert "synchronize" in card.notes
    found = json.loads(out.read_text())
    assert found["rates"] == {"matmul": 1.0}
    assert found["phases"][0]["seconds"].keys() == {"teacher", "forward", "backward"}


def test_the_doctor_looks_at_the_card(card: Card, monkeypatch) -> None:
    found = doctor_checks.devices()
    assert (found.verdict, found.found[:36]) == ("ok", "1 x NVIDIA H100 80GB HBM3 (80 GiB)"[:36])


def test_without_a_compiler_the_optimiser_is_slow(card: Card, monkeypatch) -> None:
    op = SimpleNamespace(name="FusedAdam", built=False, buildable=False)
    monkeypatch.setattr("fd_large.engine.zero.compiled_ops.ops", lambda: [op])
    found = doctor_checks.fused_code()
    assert (found.verdict, "FusedAdam cannot be built" in found.found) == ("slow", True)
    assert "nvcc" in found.remedy


def test_without_triton_the_kernels_are_slow(card: Card, monkeypatch) -> None:
    op = SimpleNamespace(name="FusedAdam", built=True, buildable=True)
    monkeypatch.setattr("fd_large.engine.zero.compiled_ops.ops", lambda: [op])
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    found = doctor_checks.fused_code()
    assert (found.verdict, "triton" in found.remedy) == ("slow", True)
    assert "FusedAdam is built" in found.found


def test_a_card_that_does_not_compute(card: Card, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch, "ones", fails)
    found = doctor_checks.devices()
    assert found.verdict == "STOPS"
    assert found.found.endswith(
        "GPU 0 does not compute: CUDA error: uncorrectable ECC error encountered"
    )


def test_tables_name_the_card(card: Card, tmp_path) -> None:
    assert device_name(distributed.device()) == card.name
    model = SimpleNamespace(label="a", source="a", image_size=32)
    rows = [results.Row(model, [50.0], [{}], [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fd_large.report.comparison.draw_comparison", lambda *_: None)
        results.finish(tmp_path, rows, "title", task="knn")
    assert json.loads((tmp_path / "summary.json").read_text())["device"] == f"1 x {card.name}"
