"""Events of a run, read back as TensorBoard reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fd_large.plan.counts import StepFlops
from fd_large.runtime.curves import TAGS
from fd_large.runtime.meter import Meter
from fd_large.runtime.tensorboard import TensorBoard


def curves(folder):
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def hooks():
    return [Meter([TensorBoard()])]


def test_every_number_has_its_curve(make_setting, run_updates, tmp_path):
    (meter,) = hooks()
    flops = {0: StepFlops(model=6, hardware=10)}
    run_updates([meter], make_setting(flops=flops), 10, evaluate=(4,), end=None)
    meter.on_evaluation(10, {"held_out_cosine": 0.5, "held_out_best_constant": 0.25, "odd": 1.0})
    meter.on_end("done")
    seen = curves(tmp_path)
    on_a_card = {TAGS["mfu"], TAGS["hardware_utilisation"]}
    held_out = {f"held_out/{metric}" for metric in ("loss", "cosine", "best_constant")}
    assert seen.keys() == {*TAGS.values(), *held_out, "evaluation/odd"} - on_a_card
    assert seen["train/loss"] == [(i + 1, i / 100) for i in range(10)]
    assert [step for step, _ in seen["speed/images_per_second"]] == list(range(1, 11))
    assert seen["held_out/loss"] == [(4, 4.0)]
    assert seen["held_out/cosine"] == [(10, 0.5)]


def test_nothing_is_doubled_after_a_kill(make_setting, run_updates, tmp_path):
    # Eight steps and three evaluations ran, but the last checkpoint has five steps.
    run_updates(hooks(), make_setting(log_every=1), 8, shift=50.0, evaluate=(2, 5, 7), end=None)
    (meter,) = hooks()
    run_updates([meter], make_setting(first=5, log_every=1), 10, evaluate=(7, 10), end=None)
    meter.on_evaluation(5, {"held_out_loss": 1.0})
    meter.on_end("done")
    seen = curves(tmp_path)
    assert seen["train/loss"] == [(i + 1, i / 100 + (50.0 if i < 5 else 0.0)) for i in range(10)]
    assert seen["held_out/loss"] == [(2, 52.0), (5, 55.0), (7, 7.0), (10, 10.0)]
