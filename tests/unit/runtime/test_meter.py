"""metrics.jsonl, evaluations.jsonl and summary.json, also over a seam."""

import json
from dataclasses import replace

import pytest

from fd_large.plan.flops import StepFlops
from fd_large.runtime import meter as meter_module
from fd_large.runtime.hooks import Tracker, Update
from fd_large.runtime.meter import Meter


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_row_an_update_and_a_summary(make_setting, run_updates, tmp_path):
    handed, seen = [], []

    class Seen(Tracker):
        def on_rows(self, rows):
            handed.append(rows)

        def on_step(self, update):
            seen.append(update.index)

        def on_evaluation(self, index, metrics):
            seen.append(metrics)

    run_updates([Meter([Seen()])], make_setting(), 10, evaluate=(10,))
    assert seen == [*range(10), {"held_out_loss": 10.0}]
    written = rows(tmp_path)
    assert [row["update"] for row in written] == list(range(10))
    assert [row["loss"] for row in written] == pytest.approx([i / 100 for i in range(10)])
    # Intervals of four, then what is left.
    assert [len(part) for part in handed] == [4, 4, 2]
    assert [row for part in handed for row in part] == written
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "done"
    assert (summary["updates"], summary["total_updates"]) == (10, 10)
    assert (summary["loss_start"], summary["loss_end"]) == pytest.approx((0.0, 0.09))
    assert summary["held_out_loss"] == 10.0
    assert summary["held_out_cosine"] is None
    assert summary["images_per_second"] > 0
    assert summary["peak_memory_bytes"] > 0


@pytest.mark.parametrize("killed_at", [5, 8, 9])
def test_every_update_and_evaluation_once_and_in_order_after_a_kill(
    killed_at, make_setting, run_updates, tmp_path
):
    first_part = Meter()
    # A checkpoint of 5 steps was written; then the process was killed.
    run_updates([first_part], make_setting(), 5, evaluate=(2, 4), end=None)
    first_part.on_save(5)
    assert [row["update"] for row in rows(tmp_path)] == list(range(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for index in range(5, killed_at):
            file.write(json.dumps({"update": index, "loss": 99.0}) + "\n")
        file.write('{"update": 9, "lo')
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"update": 5, "held_out_loss": 77.0}\n{"update": 6, "held_out_loss": 99.0}\n')

    run_updates([Meter()], make_setting(first=5), 10, evaluate=(6, 10))
    assert [row["update"] for row in rows(tmp_path)] == list(range(10))
    assert max(row["loss"] for row in rows(tmp_path)) < 1
    evaluated = [(r["update"], r["held_out_loss"]) for r in rows(tmp_path, "evaluations.jsonl")]
    assert evaluated == [(2, 2.0), (4, 4.0), (5, 77.0), (6, 6.0), (10, 10.0)]
    assert json.loads((tmp_path / "summary.json").read_text())["loss_start"] == 0.0


def test_numbers_of_one_evaluation_come_together(make_setting, run_updates, tmp_path):
    meter = Meter()
    run_updates([meter], make_setting(), 0, end=None)
    meter.on_evaluation(0, {"held_out_loss": 0.5, "held_out_cosine": 0.0})
    meter.on_evaluation(10, {"held_out_loss": 0.3, "held_out_cosine": 0.4})
    meter.on_evaluation(10, {"held_out_best_constant": 0.4, "unseen_crops_loss": 0.2})
    meter.on_end("done")
    before, after = rows(tmp_path, "evaluations.jsonl")
    assert before == {"update": 0, "held_out_loss": 0.5, "held_out_cosine": 0.0}
    assert after == {
        "update": 10,
        "held_out_loss": 0.3,
        "held_out_cosine": 0.4,
        "held_out_best_constant": 0.4,
        "unseen_crops_loss": 0.2,
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = {"held_out_loss_start": 0.5, "held_out_loss": 0.3, "held_out_cosine": 0.4}
    assert expected.items() <= summary.items()
    assert (summary["loss_best_constant"], summary["unseen_crops_loss"]) == (0.4, 0.2)


def test_speed_leaves_out_the_first_update_and_the_evaluations(
    make_setting, run_updates, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])

    class Clock(Meter):
        def after_update(self, update):
            now[0] += 100.0 if update.index == 0 else 2.0
            return super().after_update(update)

        def on_evaluation(self, index, metrics):
            now[0] += 1000.0
            super().on_evaluation(index, metrics)

    run_updates([Clock()], make_setting(), 10, evaluate=(3, 6))
    speeds = [row["images_per_second"] for row in rows(tmp_path)]
    assert speeds[0] == pytest.approx(4 * 8 / 106)
    assert speeds[4:] == pytest.approx([4.0] * 6)
    assert json.loads((tmp_path / "summary.json").read_text())["images_per_second"] == 4.0


def test_a_time_box_ends_the_run_where_the_updates_say(make_setting, run_updates, tmp_path):
    run_updates([Meter()], make_setting(total=1000), 6, total=6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["updates"], summary["total_updates"]) == (6, 6)


def test_a_run_that_stops_before_its_first_update_has_a_summary(
    make_setting, run_updates, tmp_path
):
    run_updates([Meter()], make_setting(), 0, end="stopped")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["images_per_second"] is None
    assert summary["loss_start"] is None


def test_flops_waiting_and_memory_stand_in_rows_and_summary(
    make_setting, run_updates, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter_module, "peak_memory_bytes", lambda: 123)

    class Clock(Meter):
        def after_update(self, update):
            now[0] += 100.0 if update.index == 0 else 2.0
            return super().after_update(replace(update, data_seconds=0.5))

    step = StepFlops(student_forward=1, student_backward=2, teacher_forward=3, recomputation=4)
    # Two micro batches of 4 images a step, on one rank.
    run_updates([Clock()], make_setting(flops=step), 10)
    written = rows(tmp_path)
    assert written[-1]["tflops_per_gpu"] == pytest.approx(2 * step.model / 2.0 / 1e12)
    assert written[0]["tflops_per_gpu"] == pytest.approx(4 * 2 * step.model / 106 / 1e12)
    assert written[-1]["data_wait"] == pytest.approx(0.25)
    assert written[-1]["memory_bytes"] == 123
    assert "mfu" not in written[-1], "a CPU has no peak"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tflops_per_gpu"] == pytest.approx(2 * step.model / 2.0 / 1e12)
    assert summary["data_wait"] == pytest.approx(0.25)


def test_losses_of_the_summary_are_of_updates_that_moved_the_weights(make_setting, tmp_path):
    meter, nan = Meter(), float("nan")
    meter.on_start(make_setting(total=4))
    for index, (loss, skipped) in enumerate([(nan, True), (0.5, False), (0.4, False), (9.0, True)]):
        meter.after_update(Update(index, 4, 0, loss, 1.0, 1e-3, skipped))
    meter.on_end("done")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["loss_start"], summary["loss_end"]) == (0.5, 0.4)
    assert [row.get("skipped", False) for row in rows(tmp_path)] == [True, False, False, True]
