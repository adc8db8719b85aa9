"""metrics.jsonl, evaluations.jsonl and summary.json, also over a seam."""

import json
from dataclasses import replace

import pytest

from fd_large.plan.counts import StepFlops
from fd_large.runtime import meter as meter_module
from fd_large.runtime import step_clock
from fd_large.runtime.hooks import Tracker, Update
from fd_large.runtime.meter import Meter
from fd_large.runtime.run_folder import write_status


@pytest.fixture
def rows(tmp_path):
    return lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


@pytest.fixture
def summary(tmp_path):
    return lambda: json.loads((tmp_path / "summary.json").read_text())


class Seen(Tracker):
    """What a tracker is handed."""

    def __init__(self):
        self.rows, self.others = [], []

    def on_rows(self, rows):
        self.rows.append(rows)

    def on_step(self, update):
        self.others.append(update.index)

    def on_evaluation(self, index, metrics):
        self.others.append((index, metrics))

    def on_end(self, status):
        self.others.append(status)


def test_a_row_an_update_a_summary_and_the_same_to_trackers(
    make_setting, run_updates, rows, summary
):
    seen = Seen()
    run_updates([Meter([seen])], make_setting(), 10, evaluate=(10,))
    written = rows("metrics.jsonl")
    assert [row["update"] for row in written] == list(range(10))
    assert [row["loss"] for row in written] == pytest.approx([i / 100 for i in range(10)])
    # Intervals of four, then what is left.
    assert [len(part) for part in seen.rows] == [4, 4, 2]
    assert [row for part in seen.rows for row in part] == written
    assert seen.others == [*range(10), (10, {"held_out_loss": 10.0}), "done"]
    found = summary()
    assert (found["status"], found["updates"], found["total_updates"]) == ("done", 10, 10)
    assert (found["loss_start"], found["loss_end"]) == pytest.approx((0.0, 0.09))
    assert found["held_out_loss"] == 10.0
    assert min(found["images_per_second"], found["peak_memory_bytes"]) > 0


@pytest.mark.parametrize("killed_at", [5, 8, 9])
def test_every_update_and_evaluation_once_and_in_order_after_a_kill(
    killed_at, make_setting, run_updates, rows, summary, tmp_path
):
    first_part = Meter()
    # A checkpoint of 5 steps was written; then the process was killed.
    run_updates([first_part], make_setting(), 5, evaluate=(2, 4), end=None)
    first_part.on_save(5)
    assert [row["update"] for row in rows("metrics.jsonl")] == list(range(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for index in range(5, killed_at):
            file.write(json.dumps({"update": index, "loss": 99.0}) + "\n")
        file.write('{"update": 9, "lo')
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"update": 5, "held_out_loss": 77.0}\n{"update": 6, "held_out_loss": 99.0}\n')

    run_updates([Meter()], make_setting(first=5), 10, evaluate=(6, 10))
    assert [row["update"] for row in rows("metrics.jsonl")] == list(range(10))
    assert max(row["loss"] for row in rows("metrics.jsonl")) < 1
    evaluated = [(row["update"], row["held_out_loss"]) for row in rows("evaluations.jsonl")]
    assert evaluated == [(2, 2.0), (4, 4.0), (5, 77.0), (6, 6.0), (10, 10.0)]
    assert summary()["loss_start"] == 0.0


def test_rows_begin_anew_where_the_file_is_gone(make_setting, run_updates, rows, tmp_path):
    class Removes(Tracker):
        def on_rows(self, rows):
            (tmp_path / "metrics.jsonl").unlink(missing_ok=True)

    run_updates([Meter([Removes()])], make_setting(), 7)
    run_updates([Meter([])], make_setting(first=7), 10)
    assert [row["update"] for row in rows("metrics.jsonl")] == [7, 8, 9]


def test_a_damaged_line_costs_a_resume_itself_alone_and_one_warning_a_file(
    make_setting, run_updates, rows, tmp_path, caplog
):
    first_part = Meter()
    run_updates([first_part], make_setting(), 5, evaluate=(2, 4), end=None)
    first_part.on_save(5)
    for name, line in (("metrics.jsonl", 2), ("evaluations.jsonl", 0)):
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        lines[line] = lines[line].replace(b":", b"\xff", 1)
        (tmp_path / name).write_bytes(b"".join(lines))
    run_updates([Meter()], make_setting(first=5), 10, evaluate=(6, 10))
    assert [row["update"] for row in rows("metrics.jsonl")] == [0, 1, *range(3, 10)]
    assert [row["update"] for row in rows("evaluations.jsonl")] == [4, 6, 10]
    told = [text for text in caplog.messages if "cannot be read" in text]
    assert ["metrics.jsonl: line 3" in told[0], "evaluations.jsonl: line 1" in told[1]] == [
        True
    ] * 2
    assert len(told) == 2


def test_numbers_of_one_evaluation_come_together(make_setting, run_updates, rows, summary):
    meter = Meter()
    run_updates([meter], make_setting(), 0, end=None)
    before = {"held_out_loss": 0.5, "held_out_cosine": 0.0}
    after = {"held_out_loss": 0.3, "held_out_cosine": 0.4}
    more = {"held_out_best_constant": 0.4, "unseen_crops_loss": 0.2}
    for index, numbers in ((0, before), (10, after), (10, more)):
        meter.on_evaluation(index, numbers)
    meter.on_end("done")
    assert rows("evaluations.jsonl") == [{"update": 0} | before, {"update": 10} | after | more]
    assert (after | more).items() <= summary().items()


def test_speed_waiting_and_memory_leave_out_the_first_update_and_the_evaluations(
    make_setting, run_updates, rows, summary, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter_module, "peak_memory_bytes", lambda: 123)

    class Clock(Meter):
        def after_update(self, update):
            now[0] += 100.0 if update.index == 0 else 2.0
            return super().after_update(replace(update, data_seconds=0.5, students=2))

        def on_evaluation(self, index, metrics):
            with step_clock.standing():
                now[0] += 1000.0
                super().on_evaluation(index, metrics)

    # This one of two students counts 5 of them.
    flops = {0: StepFlops(model=6e12, hardware=10e12, frozen=2e12)}
    run_updates([Clock()], make_setting(flops=flops), 10, evaluate=(3, 6))
    written, found = rows("metrics.jsonl"), summary()
    assert written[0]["images_per_second"] == pytest.approx(4 * 8 / 106)
    # Two micro batches of 4 images a step, on one rank.
    assert written[0]["tflops_per_gpu"] == pytest.approx(4 * 2 * 5 / 106)
    for row in (written[-1], found):
        assert row["images_per_second"] == pytest.approx(4.0)
        assert row["tflops_per_gpu"] == pytest.approx(2 * 5 / 2.0)
        assert row["data_wait"] == pytest.approx(0.25)
        assert "mfu" not in row, "a CPU has no peak"
    assert written[-1]["memory_bytes"] == 123


def test_each_step_counts_by_the_size_of_its_images(
    make_setting, run_updates, rows, summary, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])

    class Clock(Meter):
        def after_update(self, update):
            side = 16 if update.index % 2 else 32
            now[0] += side / 16
            return super().after_update(replace(update, image_size=side))

    flops = {side: StepFlops(model=side * 10**12, hardware=side) for side in (16, 32)}
    setting = make_setting(flops=flops, image_sizes=(16, 32))
    run_updates([Clock()], setting, 10)
    written, found = rows("metrics.jsonl"), summary()
    assert [row["image_size"] for row in written] == [32, 16] * 5
    # Two micro batches a step; 16 TFLOP take a second.
    assert written[0]["tflops_per_gpu"] == pytest.approx(2 * 16)
    assert found["tflops_per_gpu"] == pytest.approx(2 * 16)
    assert found["images_per_second_of_sizes"] == {"16": pytest.approx(8), "32": pytest.approx(4)}


def test_a_run_that_stops_before_its_first_update_has_a_summary(make_setting, run_updates, summary):
    run_updates([Meter()], make_setting(), 0, end="stopped")
    found = summary()
    assert (found["status"], found["images_per_second"], found["loss_start"]) == (
        *("stopped", None, None),
    )


def test_losses_of_the_summary_are_of_updates_that_moved_the_weights(make_setting, rows, summary):
    meter, nan = Meter(), float("nan")
    meter.on_start(make_setting(total=4))
    for index, (loss, skipped) in enumerate([(nan, True), (0.5, False), (0.4, False), (9.0, True)]):
        meter.after_update(Update(index, 0, loss, 1.0, 1e-3, skipped))
    meter.on_end("done")
    assert (summary()["loss_start"], summary()["loss_end"]) == (0.5, 0.4)
    skipped = [row.get("skipped", False) for row in rows("metrics.jsonl")]
    assert skipped == [True, False, False, True]


def test_an_error_ends_a_run_with_a_summary_too(make_setting, run_updates, rows, summary):
    meter = Meter()
    run_updates([meter], make_setting(start="this"), 6, end=None)
    meter.on_failure("failed", "no such card")
    assert len(rows("metrics.jsonl")) == 6
    found = summary()
    assert (found["status"], found["reason"]) == ("failed", "no such card")
    assert (found["updates"], found["start"]) == (6, "this")


def test_the_rank_that_failed_first_knows_why(make_setting, run_updates, tmp_path, summary):
    meter = Meter()
    run_updates([meter], make_setting(start="this"), 2, end=None)
    write_status(tmp_path, "failed", start="this", reason="out of memory")
    meter.on_failure("failed", "another rank has ended")
    assert summary()["reason"] == "out of memory"
    write_status(tmp_path, "hung", start="this")
    meter.on_failure("failed", "another rank has ended")
    assert summary()["status"] == "hung"


def test_who_lost_the_folder_writes_nothing(make_setting, run_updates, rows, tmp_path, caplog):
    lost = []
    setting = make_setting(owned=lambda: not lost)
    meter = Meter()
    run_updates([meter], setting, 4, end=None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    lost.append(True)
    for index in range(4, 8):
        meter.after_update(Update(index, 0, 0.5, 1.0, 1e-3))
    meter.on_evaluation(8, {"loss": 1.0})
    meter.on_end("done")
    meter.on_failure("failed", "x")
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    assert "has a new owner" in caplog.text
