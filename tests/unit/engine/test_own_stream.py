"""The order in which two streams wait for one another, on a card that is not here."""

import torch
from fake_cuda import Card, on_card

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
