from types import SimpleNamespace

import pytest
import torch

from fd_large.data.loader import Batch
from fd_large.engine.counting import micro_batch
from fd_large.engine.memory import OutOfMemory, memory_setting
from fd_large.ranks import distributed


class FakeMemory:
    """Peak of a phase = base + slope * size, without a device."""

    def __init__(self, capacity):
        self.room, self.now = capacity, 0

    def reset(self):
        self.now = 0

    def peak(self):
        return self.now

    def capacity(self):
        return self.room


def _climb(share, capacity, *phases, together=1):
    """Runs the climb over (base, slope) phases; returns the size and all sizes that ran."""
    memory, ran = FakeMemory(capacity), []

    def phase(base, slope):
        def run(size):
            memory.now = base + slope * size
            ran.append(size)

        return run

    found = micro_batch.largest_that_fits(
        share, [phase(*p) for p in phases], memory, together=together
    )
    return found, sorted(set(ran))


def test_candidates_are_powers_of_two_that_divide_the_share():
    assert micro_batch.candidates(24) == (1, 2, 4, 8)
    assert micro_batch.candidates(7) == (1,)


def test_candidates_of_images_that_share_statistics_hold_whole_groups():
    assert micro_batch.candidates(64, 16) == (1, 2, 4, 8, 16, 32, 64)
    assert micro_batch.candidates(100, 25) == (1, 2, 4, 8, 16, 25, 50, 100)
    assert micro_batch.candidates(12, 32) == (1, 2, 4, 8, 12)  # A group lies on several ranks.


def test_less_than_a_group_is_tried_and_not_taken():
    # 16 images need 260.
    assert _climb(64, 300, (100, 10), together=16)[0] == 16
    with pytest.raises(OutOfMemory, match=r"^student\.norm_batch: .*16 .* 8, .*norm_batch 8,"):
        _climb(64, 250, (100, 10), together=16)
    with pytest.raises(OutOfMemory, match=r"^student\.norm_batch: .*Set --student\.activation"):
        _climb(64, 115, (100, 10), together=16)


@pytest.mark.parametrize(("share", "together"), [(48, 32), (24, 16)])
def test_a_group_that_does_not_divide_the_share_needs_all_of_it(share, together):
    assert _climb(share, 110 + 11 * share, (100, 10), together=together)[0] == share
    with pytest.raises(OutOfMemory, match=r"^student\.norm_batch: "):
        _climb(share, 110 + 11 * together, (100, 10), together=together)


def test_takes_the_largest_that_fits_and_never_runs_one_that_would_not():
    # 8 images need 180; 16 would need 260 of 250.
    assert _climb(64, 250, (100, 10)) == (8, [1, 2, 4, 8])
    assert _climb(64, 250, (70, 10))[0] == 16  # 230 are just its 92%.
    assert _climb(64, 810, (100, 10)) == (64, [1, 2, 4, 8, 16, 32, 64])
    assert _climb(12, 300, (100, 10)) == (4, [1, 2])


def test_ends_at_once_where_there_is_room_for_so_many_times_the_memory():
    # 110 times 64 are 92% of 7,652.
    assert _climb(64, 7_653, (100, 10)) == (64, [1])
    assert _climb(64, 7_651, (100, 10)) == (64, [1, 2])


def test_a_phase_that_overtakes_another_is_foreseen():
    # The step's flat 200 hides the activations at 1, 2 and 4 images; at 16 they need 260 of 250.
    assert _climb(64, 250, (100, 10), (200, 0)) == (8, [1, 2, 4, 8])


def test_moments_that_the_first_step_makes_count_as_held_and_not_as_images():
    memory, held = FakeMemory(300), [0]

    def step(size):
        held[0] = 100  # From the end of the first step on, every phase holds them.
        memory.now = held[0] + 10 * size

    def through(size):
        memory.now = held[0] + 10 * size

    # 16 images need 260, 32 would need 420.
    assert micro_batch.largest_that_fits(64, [through, step], memory) == 16


def test_not_even_one_image():
    with pytest.raises(OutOfMemory):
        _climb(8, 10, (5, 0), (10, 1))


def test_a_found_size_is_remembered_for_the_same_setting_only(tmp_path, caplog):
    caplog.set_level("INFO")
    # What JSON gives back is no tuple.
    two = {"world_size": 2, "student": {"init_allow": ()}}
    assert micro_batch.remembered(tmp_path, two, 16) is None
    micro_batch.remember(tmp_path, two, 8)
    assert micro_batch.remembered(tmp_path, two, 16) == 8
    assert micro_batch.remembered(tmp_path, {**two, "world_size": 3}, 16) is None
    assert micro_batch.remembered(tmp_path, two, 12) is None, "8 does not divide 12"
    assert "(world_size)" in caplog.text
    caplog.clear()
    assert micro_batch.remembered(tmp_path, {**two, "software": 1}, 16) is None, "an older file"
    assert "(software)" in caplog.text
    (tmp_path / "micro_batch.json").write_text("{")
    assert micro_batch.remembered(tmp_path, two, 16) is None


def test_a_resume_on_smaller_cards_probes_again(tmp_path, monkeypatch):
    properties = SimpleNamespace(name="A100", total_memory=80 << 30)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    micro_batch.remember(tmp_path, {"world_size": 2, **memory_setting()}, 8)
    same = {"world_size": 2, **memory_setting()}
    assert same == {"world_size": 2, "device": "A100", "memory_bytes": 80 << 30}
    assert micro_batch.remembered(tmp_path, same, 16) == 8
    properties.total_memory = 40 << 30
    smaller = {"world_size": 2, **memory_setting()}
    assert micro_batch.remembered(tmp_path, smaller, 16) is None


class Taught(torch.nn.Module):
    def learnt(self, images, targets):
        return images + 1


@pytest.mark.parametrize("several", [True, False])
def test_a_probe_keeps_what_several_students_take_of_the_whole_step(monkeypatch, several):
    kept, seen = {}, []
    copies = micro_batch._copies

    def noted(task, batch, count):
        found = copies(task, batch, count)
        kept[len(batch.images)] = sum(tensor.numel() for tensor in found)
        return found

    def climb(share, phases, memory, *, together):
        seen.append(share)
        for size in (1, 2, 4):
            for phase in phases:
                phase(size)
        return 2

    monkeypatch.setattr(micro_batch, "_copies", noted)
    monkeypatch.setattr(micro_batch, "backward", lambda *_: None)
    monkeypatch.setattr(micro_batch, "arguments_of_step", lambda *_, **__: (e for e in [{}]))
    monkeypatch.setattr(micro_batch, "largest_that_fits", climb)
    engine = SimpleNamespace(task=Taught(), deepspeed=SimpleNamespace(step=lambda: None))
    engines = [engine] * (2 if several else 1)
    found = micro_batch.probe(engines, batch_of, share=8, seed=0)
    assert (found, seen) == (2, [8, 2] if several else [8])
    # What is kept of a step's 8 images: those of the other micro batches, and their targets.
    assert kept == ({1: 14, 2: 12, 4: 8} if several else {})


def batch_of(size):
    positions = torch.arange(size)
    return Batch(torch.zeros(size, 1, 1, 1), 0, positions, positions)
