"""The guard: what is off, what follows, what is written down, and the same over a seam."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fd_large.errors import ConfigError
from fd_large.recipes.sections import Guard as Limits
from fd_large.runtime import guard as guard_module
from fd_large.runtime.guard import KNOWN, WINDOW, Guard, culprits_of, findings, past_of
from fd_large.runtime.hooks import Evidence, Update, Verdict
from fd_large.runtime.meter import Meter

NAN, INF = math.nan, math.inf


def update(index=50, loss=1.0, norm=2.0, **more):
    return Update(index, 0, loss, norm, 1e-3, **more)


def evidence(losses=(1.0, 2.0), maxima=None, not_finite=()):
    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2)
    positions = torch.arange(100, 104)
    layers = {"teacher.a": 1.0, "student.b": 2.0} if maxima is None else maxima
    return Evidence(
        list(images.split(2)), positions, positions + 1000, list(losses), layers, [*not_finite]
    )


def noise(index):
    return random.Random(index).gauss(0, 1)


def history(length, loss=lambda i: 1.0 + 0.02 * noise(i), norm=lambda i: 2 * math.exp(noise(-i))):
    return [(i, loss(i), norm(i)) for i in range(length)]


@pytest.mark.parametrize("known", [0, 1, KNOWN, WINDOW])
@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_what_is_not_finite_is_off_from_the_first_update(known, loss, norm):
    found = findings(update(loss=loss, norm=norm), history(known), 10.0)
    assert [f.what for f in found] == ["gradient norm" if loss == 1.0 else "loss"]
    assert str(loss + norm) in found[0].in_words()


@pytest.mark.parametrize(
    ("loss", "norm", "off"),
    [
        (1.1, 10.0, []),
        (0.01, 1e-3, []),  # far below is no harm
        (3.0, 2.0, ["loss"]),
        (1.0, 1e9, ["gradient norm"]),
        (3.0, 1e9, ["loss", "gradient norm"]),
    ],
)
def test_a_spike_is_off_once_enough_is_known(loss, norm, off):
    judged = update(loss=loss, norm=norm)
    assert [f.what for f in findings(judged, history(KNOWN), 10.0)] == off
    assert findings(judged, history(KNOWN - 1), 10.0) == []


def test_spikes_that_were_let_through_do_not_hide_the_next_one():
    spiky = history(WINDOW, loss=lambda i: 50.0 if i % 4 == 0 else 1.0 + 0.02 * noise(i))
    assert findings(update(loss=50.0), spiky, 10.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda i: 0.7,
        lambda i: 0.7 + 1e-7 * noise(i),
        lambda i: 5 * 0.97**i * (1 + 0.05 * noise(i)) + 0.1,
        lambda i: 1.0 if i < 60 else 0.2 + 0.01 * noise(i),
        lambda i: 0.5 + 0.002 * i + 0.02 * noise(i),  # slowly worse
        lambda i: 0.0,
    ],
    ids=["flat", "almost flat", "falling", "falling at once", "rising slowly", "zero"],
)
def test_an_ordinary_curve_is_never_off(loss):
    curve = history(400, loss, norm=lambda i: 5 * math.exp(-i / 50) + 0.5 * math.exp(noise(i) / 3))
    for index in range(len(curve)):
        judged = update(index, curve[index][1], curve[index][2])
        assert findings(judged, curve[max(0, index - WINDOW) : index], 10.0) == []


def test_what_was_let_through_while_the_guard_was_off_does_not_blind_it():
    rows = [
        {"update": i, "loss": NAN if i % 2 else 1.0, "grad_norm": 2.0} for i in range(2 * KNOWN)
    ]
    past = past_of(rows, {})
    assert [index for index, _, _ in past.accepted] == list(range(0, 2 * KNOWN, 2))
    assert findings(update(loss=3.0), past.accepted, 10.0)


@pytest.mark.parametrize("limits", [{"skips": 0}, {"roll_backs": -1}, {"spread": 0.0}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ConfigError, match=f"guard.{next(iter(limits))}: "):
        Limits(**limits)


def test_the_ranks_at_fault():
    assert culprits_of([[1.0, 2.0], [1.0, NAN], [INF, 1.0]]) == [1, 2]
    assert culprits_of([[1.0, 2.0], [1.0, 9.0], [3.0, 3.0]]) == [1]


@pytest.fixture
def started(make_setting):
    def start(first=0, **limits):
        setting = make_setting(first, 1000, log_every=7, name_of=lambda index: f"image {index}")
        hooks = [Meter(), Guard(Limits(**limits))]
        for hook in hooks:
            hook.on_start(setting)
        return hooks

    return start


def one(hooks, judged, evidence_of_it=None):
    """What the loop does with a step; returns its verdict, `skip` as it was carried out."""
    skip = Verdict.all_of(hook.judge(judged) for hook in hooks).skip
    judged = replace(judged, skipped=skip)
    if skip:
        for hook in hooks:
            hook.on_skip(judged, evidence_of_it or evidence())
    return replace(Verdict.all_of(hook.after_update(judged) for hook in hooks), skip=skip)


def test_a_row_of_refused_updates_rolls_back_and_then_ends_the_run(started, tmp_path, caplog):
    hooks = started(skips=2, roll_backs=1)
    # The row of 1 is what the restored state came from: 5 does not go on with it.
    bad, said = (1, 3, 4, 5, 7, 8), []
    for index in range(9):
        verdict = one(hooks, update(index, NAN if index in bad else 1.0))
        said.append(verdict)
        if verdict.roll_back is not None:
            for hook in hooks:
                hook.on_save(index + 1)
                hook.on_roll_back(update(index), 2)
    assert [verdict.skip for verdict in said] == [i in bad for i in range(9)]
    # One alone is no row; the second of a row asks for the state before the first of it.
    assert {i: v.roll_back for i, v in enumerate(said) if v.roll_back is not None} == {4: 3}
    assert {i: v.stop for i, v in enumerate(said) if v.stop} == {8: "guard"}
    assert "steps 8 to 9 were refused" in caplog.text
    incidents = sorted(path.name for path in (tmp_path / "incidents").iterdir())
    assert incidents == [f"update_{i + 1:08d}" for i in bad]
    restored = [
        json.loads((tmp_path / "incidents" / name / "incident.json").read_text())["restored"]
        for name in incidents
    ]
    assert restored == [None, None, 2, None, None, None]


def test_a_roll_back_after_which_no_step_is_accepted_goes_further_back(started):
    hooks = started(skips=2, roll_backs=4)
    bad, taken = (4, 5, 6, 7, 9, 10, 11, 12), {}
    for index in range(13):
        verdict = one(hooks, update(index, NAN if index in bad else 1.0))
        if verdict.roll_back is not None:
            taken[index] = verdict.roll_back
            for hook in hooks:
                hook.on_save(index + 1)
                hook.on_roll_back(update(index), {5: 3, 7: 2, 10: 8, 12: 1}[index])
            # A resume knows it, too.
            assert started(index + 1, skips=2, roll_backs=4)[1]._past == hooks[1]._past
    # 6 and 7 follow at once on the way back to 3; after the accepted 8 all is as before. What was
    # saved after 7 is a copy of the state of 2 steps, so 11 and 12 lead to one before that.
    assert taken == {5: 4, 7: 2, 10: 9, 12: 1}


@pytest.mark.parametrize("restored", [6, 10**9, "5", [5], {}])
def test_an_incident_that_names_no_older_state_hangs_nothing(started, tmp_path, restored):
    hooks = started(skips=1, roll_backs=9)
    for index in range(6):
        one(hooks, update(index, NAN if index == 5 else 1.0))
    for hook in hooks:
        hook.on_save(6)
    path = tmp_path / "incidents/update_00000006/incident.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"restored": restored}))
    hooks = started(6, skips=1, roll_backs=9)
    assert 0 <= one(hooks, update(6, NAN)).roll_back < 10**9


def test_a_state_that_is_not_finite_is_taken_back_at_once_and_named(started, tmp_path, caplog):
    hooks = started(roll_backs=2)
    broken = [f"exp_avg.student.{number}" for number in range(guard_module.NAMED + 3)]
    for index in range(3):
        one(hooks, update(index))
    verdict = one(hooks, update(3, NAN), evidence(not_finite=broken))
    assert (verdict.skip, verdict.roll_back) == (True, 3)
    for hook in hooks:
        hook.on_roll_back(update(3), 2)
    said = json.loads((tmp_path / "incidents/update_00000004/incident.json").read_text())
    assert said["state_not_finite"] == [
        {"rank": 0, "kind": "exp_avg", "tensor": f"student.{number}"}
        for number in range(guard_module.NAMED)
    ]
    assert said["restored"] == 2
    assert "exp_avg of student.0 on rank 0" in caplog.text
    # The next refusal is an ordinary one again, until the state is lost once more.
    assert one(hooks, update(4, NAN)).roll_back is None
    assert one(hooks, update(5, NAN), evidence(not_finite=broken)).roll_back == 1
    for hook in hooks:
        hook.on_roll_back(update(5), 1)
    assert one(hooks, update(6, NAN), evidence(not_finite=broken)).stop == "guard"


def test_a_state_that_is_not_finite_at_the_last_step_is_left_to_the_next_start(started):
    verdict = one(started(), update(999, NAN), evidence(not_finite=["ema.student.norm"]))
    assert (verdict.roll_back, verdict.stop) == (None, "guard")


def test_no_roll_back_allowed_ends_the_run_at_once(started):
    assert one(started(skips=1, roll_backs=0), update(0, NAN)) == Verdict(True, None, "guard")


def test_an_incident_says_what_was_off_and_keeps_the_pictures(started, tmp_path, caplog):
    hooks = started()
    for index in range(KNOWN):
        one(hooks, update(index))
    layers = {"teacher.a": 1.0, "student.b": INF, "student.c": INF}
    one(hooks, update(KNOWN, 4.0, NAN), evidence((3.0, 5.0), layers))
    folder = tmp_path / "incidents" / f"update_{KNOWN + 1:08d}"
    said = json.loads((folder / "incident.json").read_text())
    assert (said["index"], said["loss"], said["skipped"]) == (KNOWN, 4.0, True)
    loss, norm = said["off"]
    assert loss == {
        "what": "loss", "value": 4.0, "median": 1.0, "limit": pytest.approx(1.5),
        "spread": pytest.approx(0.05),
    }  # fmt: skip
    assert norm["median"] == pytest.approx(2.0)
    assert math.isnan(norm["value"])
    assert said["first_layer_not_finite"] == "student.b"
    assert list(said["layers"]) == list(layers)
    assert said["culprits"] == [0]
    (rank,) = said["ranks"]
    assert rank["losses"] == [3.0, 5.0]
    assert rank["positions"] == [100, 101, 102, 103]
    assert rank["names"] == [f"image {i}" for i in range(1100, 1104)]
    stored = load_file(folder / said["images"][0])
    assert torch.equal(stored["images"], torch.cat(evidence().images))
    assert stored["positions"].tolist() == rank["positions"]
    assert re.search(r"loss is 4, .*median 1 \(limit 1\.5\)", caplog.text)
    assert "student.b is the first" in caplog.text
    assert str(folder) in caplog.text


def test_only_the_newest_incidents_keep_pictures(started, tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "INCIDENTS_WITH_IMAGES", 2)
    hooks = started(skips=100)
    for index in range(4):
        one(hooks, update(index, NAN))
    kept = [path.parent.name[-1] for path in (tmp_path / "incidents").rglob("*.safetensors")]
    assert sorted(kept) == ["3", "4"]
    assert len(list((tmp_path / "incidents").rglob("incident.json"))) == 4


def test_a_full_disk_is_told_and_the_run_goes_on(started, tmp_path, caplog):
    hooks = started(skips=2)
    (tmp_path / "incidents").write_text("no folder")
    assert one(hooks, update(0, NAN)).skip
    assert one(hooks, update(1, NAN)).roll_back == 0
    for hook in hooks:
        hook.on_roll_back(update(1), 0)
    assert "NOT WRITTEN" in caplog.text
    assert "its loss is nan" in caplog.text
    assert one(hooks, update(2)) == Verdict()


class Run:
    """A run without models: the loss falls with the steps taken and is off at some steps."""

    def __init__(self, seed, started, *, total=200):
        self.draws = random.Random(seed)
        self.started, self.total = started, total
        self.bad = {i: self.draws.choice((NAN, 9.0)) for i in range(total) if self._off()}
        for first in self.draws.sample(range(20, total - 10), 3):
            self.bad |= dict.fromkeys(range(first, first + self.draws.randrange(2, 7)), 9.0)
        self.checkpoints = {0: 0}
        # A roll-back takes the newest checkpoint, so one more may change what it finds: here it
        # takes those alone that both runs have.
        self.common = {0}
        self.verdicts = {}
        self.windows = {}

    def _off(self):
        return self.draws.random() < 0.02

    def train(self, *, stops=(), dies=()):
        """Trains to the end: stopped with a save after some steps, killed after others."""
        stops, dies = set(stops), set(dies)
        ended = False
        while not ended:
            ended = self._part(stops, dies)

    def _part(self, stops, dies):
        first = max(self.checkpoints)
        steps = self.checkpoints[first]
        hooks = self.started(first, skips=3, roll_backs=2)
        for index in range(first, self.total):
            loss = self.bad.get(index, 2 / (1 + 0.02 * steps) * (1 + 0.02 * noise(index)))
            verdict = one(hooks, update(index, loss, math.exp(noise(-index) / 3)))
            self.verdicts[index] = (str(loss), verdict)
            self.windows[index] = list(hooks[1]._past.accepted)
            steps += not verdict.skip
            if verdict.stop:
                return True
            if verdict.roll_back is not None:
                restored = max(k for k in self.common if k <= verdict.roll_back)
                steps = self.checkpoints[restored]
                for hook in hooks:
                    hook.on_roll_back(update(index), restored)
                # The loop saves at once, so a kill in between repeats the roll-back.
                if index in dies:
                    dies.remove(index)
                    return False
            due = (index + 1) % 30 == 0 and not verdict.skip
            if due or verdict.roll_back is not None or index in stops:
                for hook in hooks:
                    hook.on_save(index + 1)
                self.checkpoints[index + 1] = steps
                if due or verdict.roll_back is not None:
                    self.common.add(index + 1)
            if index in stops or index in dies:
                stops.discard(index)
                dies.discard(index)
                return False
        return True


@pytest.mark.parametrize("seed", range(12))
def test_a_resumed_run_decides_as_one_that_was_never_interrupted(
    seed, started, tmp_path, tmp_path_factory
):
    whole = Run(seed, started)
    whole.train()
    for path in tmp_path.iterdir():
        path.rename(tmp_path_factory.mktemp("whole") / path.name)
    cut = Run(seed, started)
    refused = [i for i, (_, verdict) in whole.verdicts.items() if verdict.skip]
    backs = [i for i, (_, verdict) in whole.verdicts.items() if verdict.roll_back is not None]
    draws = random.Random(-seed)
    stops = [*draws.sample(range(200), 5), *refused[::3]]
    cut.train(stops=stops, dies=[*draws.sample(range(200), 5), *backs])
    assert cut.verdicts == whole.verdicts
    assert cut.windows == whole.windows


def test_an_incident_that_a_resume_undoes_counts_no_more(started, tmp_path):
    hooks = started(skips=1, roll_backs=1)
    one(hooks, update(0))
    for hook in hooks:
        hook.on_save(1)
    assert one(hooks, update(1, NAN)).roll_back == 1
    for hook in hooks:
        hook.on_roll_back(update(1), 1)
    # Killed before the checkpoint that follows a roll-back; this time the step is sound.
    hooks = started(1, skips=1, roll_backs=1)
    assert [path.name for path in (tmp_path / "incidents").iterdir()] == [
        "superseded_update_00000002"
    ]
    one(hooks, update(1))
    for hook in hooks:
        hook.on_save(2)
    hooks = started(2, skips=1, roll_backs=1)
    assert one(hooks, update(2, NAN)).roll_back == 2
