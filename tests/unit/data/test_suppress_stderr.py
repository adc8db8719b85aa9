from __future__ import annotations

import io
import os
import threading

import pytest
import torch
from PIL import Image

from fd_large.data.decode import decode
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.ranks import distributed

NOISE = b"Corrupt JPEG data: 3826 extraneous bytes before marker 0xd9\n"


@pytest.mark.parametrize(
    "line",
    [
        NOISE,
        b"Premature end of JPEG file\n",
        b"libpng warning: iCCP: known incorrect sRGB profile\n",
        b"TIFFReadDirectory: Warning, Unknown field with tag 700.\n",
    ],
)
def test_lines_of_the_decoders_are_dropped_and_others_kept_in_order(capfd, line):
    with suppress_stderr():
        os.write(2, b"before\n")
        os.write(2, line)
        os.write(2, b"after\n")
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "before\nafter\noutside\n"


def test_nothing_stays_for_the_next_time(capfd):
    for _ in range(3):
        with suppress_stderr():
            os.write(2, b"once\n")
        assert capfd.readouterr().err == "once\n"


def test_blocks_may_be_nested_and_left_by_an_error(capfd):
    def fail() -> None:
        with suppress_stderr(), suppress_stderr():
            os.write(2, NOISE + b"kept\n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "kept\noutside\n"


def in_a_child(said: bytes, *, ends_inside: bool = False) -> None:
    """Lets a forked child say something, and end within the block or after it."""
    child = os.fork()
    if child == 0:
        with suppress_stderr():
            os.write(2, NOISE + said)
            if ends_inside:
                os._exit(134)
        os._exit(0)
    os.waitpid(child, 0)


def test_a_forked_child_has_its_own(capfd):
    with suppress_stderr():
        os.write(2, NOISE)
    in_a_child(b"child\n")
    with suppress_stderr():
        os.write(2, b"parent\n")
    assert capfd.readouterr().err == "child\nparent\n"


@pytest.mark.parametrize("where", ["several ranks", "a GPU", "a loading process of several"])
def test_last_words_of_a_process_that_trains_are_not_kept_in_memory(capfd, monkeypatch, where):
    if where != "a GPU":
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
    else:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if where == "a loading process of several":
        monkeypatch.setattr("fd_large.data.suppress_stderr.get_worker_info", lambda: "worker 0")
    in_a_child(b"NCCL WARN\n", ends_inside=True)
    in_training = where != "a loading process of several"
    assert ("NCCL WARN" in capfd.readouterr().err) == in_training


def test_threads_lose_nothing(capfd):
    def write() -> None:
        for _ in range(200):
            with suppress_stderr():
                os.write(2, NOISE + b"kept\n")

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("kept\n") == 600


def test_a_process_without_stderr_decodes(photograph):
    buffer = io.BytesIO()
    Image.fromarray(photograph(20, 30)).save(buffer, "JPEG")
    saved = os.dup(2)
    os.close(2)
    try:
        shape = decode(buffer.getvalue(), "x").shape
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert shape == (3, 20, 30)
