"""The order in which two streams wait for one another, on a card that is not here."""

from types import SimpleNamespace

import asynchronous
import pytest
import torch
from fake_cuda import Card, on_card

from fd_large.engine import own_stream
from fd_large.engine.own_stream import beside


def test_the_streams_wait_before_each_reads_what_the_other_wrote(card: Card) -> None:
    images = on_card(torch.ones(2))

    def compute():
        card.notes.append(f"teacher on {torch.cuda.current_stream().name}")
        return {"a": (images + 1, None), "b": (images + 2, None)}

    found = beside(compute, [images, None], images.device)
    card.notes.append("student")
    assert list(found) == ["a", "b"], "a look at names does not wait"
    assert [found[name][0].tolist() for name in found] == [[2.0, 2.0], [3.0, 3.0]]
    assert card.notes == [
        "side waits for main",
        "teacher on side",
        "record_stream side",
        "student",
        "main waits for side",
        *["record_stream main"] * 2,
    ]


def test_elsewhere_it_is_an_ordinary_call() -> None:
    found = {"a": torch.ones(1)}
    assert beside(lambda: found, (), torch.device("cpu")) is found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> asynchronous.Device:
    """A device that lags behind the host, with CPU tensors, and with what torch.cuda has of one."""
    device = asynchronous.Device()
    device.streams.append(asynchronous.Stream())
    monkeypatch.setattr(asynchronous, "DEVICE", device)
    monkeypatch.setattr(own_stream, "_streams", {})
    monkeypatch.setattr(own_stream, "_has_streams", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", asynchronous.record_stream)
    for name, stand_in in asynchronous.of_torch().items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device


def begun(device: asynchronous.Device) -> SimpleNamespace:
    """A teacher's maps that were asked for, what the student did meanwhile, and both streams."""
    images, cpu = torch.ones(2), torch.device("cpu")
    student = device.stream
    asked_at = student.clock[student.id]
    maps = beside(lambda: {"a": (images + 1) * 2}, [images], cpu)
    tokens = images * 3
    teacher = own_stream._streams[cpu]
    return SimpleNamespace(maps=maps, tokens=tokens, asked_at=asked_at, streams=(teacher, student))


def test_teacher_and_student_overlap_between_the_two_events(device: asynchronous.Device) -> None:
    with device:
        step = begun(device)
        teacher, student = step.streams
        assert teacher.clock[student.id] == step.asked_at, "the teacher waits for its images alone"
        assert student.clock[student.id] > step.asked_at, "the student goes on"
        assert teacher.id not in student.clock, "and does not wait for the teacher"
        assert (step.maps["a"] - step.tokens).tolist() == [1.0, 1.0]
        assert student.clock[teacher.id] == teacher.clock[teacher.id]
    assert device.races == set()
    assert device.waits == []


def test_a_look_past_the_event_is_seen(device: asynchronous.Device) -> None:
    with device:
        step = begun(device)
        step.maps._results["a"] - step.tokens
    (race,) = device.races
    assert "sub reads what mul writes beside it" in race
