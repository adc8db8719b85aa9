"""Counts as data: lines through two counts, the highest of several."""

import random

from fd_large.plan.counts import (
    Counts,
    Line,
    Product,
    grouped,
    highest,
    of_sizes,
    of_students,
    sizes,
    through,
)


def test_a_line_through_two_counts():
    line = through(30, 50, (2, 4))
    assert line == Line(10, 10)
    assert [line.at(n) for n in (1, 8)] == [20, 90]
    assert line + Line(1, 2) == Line(11, 12)


def test_the_highest_lines_are_kept():
    generator = random.Random(0)
    for _ in range(200):
        lines = [Line(generator.randrange(99), generator.randrange(9)) for _ in range(12)]
        kept = highest(lines)
        assert set(kept) <= set(lines)
        assert len(kept) <= len({line.each for line in lines})
        for images in range(1, 120):
            expected = max(line.at(images) for line in lines)
            assert max(line.at(images) for line in kept) == expected


def test_sizes_are_grouped_by_elements():
    assert grouped([5, 7, 5]) == ((5, 2), (7, 1))
    assert sizes(grouped([5, 7, 5])) == [5, 5, 7]


def of_one(*, teacher: int, student: int) -> Counts:
    """Counts of a student beside a teacher, with so many FLOPs an image in their products."""

    def product(phase, flops):
        return Product(phase, False, 1, Line(0, flops), Line(0, 1))

    return Counts(
        products=(product("inference", teacher), product("forward", student)),
        again=Line(0, 0),
        moved={"inference": Line(0, 5), "forward": Line(1, student)},
        calls={"inference": 4, "forward": 3},
        modules={"forward": 2},
        blocks={"forward": 5},
        kept=Line(0, student),
        peak=(Line(10, student),),
        student=((student, 2),),
        frozen=(((teacher, 1),),),
    )


def test_several_students_share_what_frozen_models_compute():
    counts = of_students([of_one(teacher=100, student=30), of_one(teacher=100, student=50)])
    assert counts.step_flops(2).model == 2 * (100 + 30 + 50)
    assert counts.moved == {"inference": Line(0, 5), "forward": Line(2, 80)}
    assert (counts.calls, counts.modules) == ({"inference": 4, "forward": 6}, {"forward": 4})
    assert counts.blocks == {"forward": 10}
    # One computes at a time; all states are held, and the teacher once.
    assert counts.peak_at(3) == 10 + 3 * 50
    assert (counts.student, counts.frozen) == (((30, 2), (50, 2)), (((100, 1),),))


def test_a_step_of_stored_maps_has_no_work_of_the_teacher():
    counts = of_one(teacher=100, student=30).without("inference")
    assert counts.step_flops(2).hardware == 2 * 30
    assert (counts.moved, counts.calls) == ({"forward": Line(1, 30)}, {"forward": 3})


def test_a_micro_batch_of_several_students_waits_until_the_step_is_over():
    each = [of_one(teacher=100, student=30), of_one(teacher=100, student=50)]
    assert of_students(each).held == Line(0, 0)
    counts = of_students(each, shared=Line(0, 7))
    assert counts.in_step_of(4).held == Line(0, 7)
    assert counts.in_step_of(1).held == Line(0, 0)


def test_steps_of_several_sizes_take_the_mean_time_and_the_most_memory():
    counts = of_sizes([of_one(teacher=100, student=30), of_one(teacher=140, student=50)])
    assert counts.step_flops(2).model == 2 * (120 + 40)
    assert counts.flops("forward", 1) == 40
    assert counts.moved == {"inference": Line(0, 5), "forward": Line(1, 40)}
    assert (counts.calls, counts.modules) == ({"inference": 4, "forward": 3}, {"forward": 2})
    assert counts.peak_at(3) == 10 + 3 * 50
    assert counts.kept == Line(0, 50)
    assert counts.student == ((50, 2),)
