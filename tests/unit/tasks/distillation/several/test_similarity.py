import torch

from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.several.similarity import (
    QUEUE,
    SummaryQueue,
    pushed,
    queue_divergence,
    relation_divergence,
    units,
)


def random_units(*shape):
    return units(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def test_a_student_like_its_teacher_has_no_divergence_and_one_turned_against_it_has():
    teacher, queue = random_units(3, 8), random_units(2, 5, 8)[0]
    assert queue_divergence(teacher, teacher, queue).abs().max() < 1e-6
    assert (queue_divergence(-teacher, teacher, queue) > 0.1).all()


def test_relations_know_neither_rotations_nor_widths():
    tokens = random_units(2, 5, 8)
    rotation = torch.linalg.qr(torch.randn(12, 12))[0][:8]
    assert relation_divergence(tokens @ rotation, tokens).abs().max() < 1e-6
    assert (relation_divergence(tokens.flip(1), tokens) > 1e-4).all()


def test_a_lower_temperature_sharpens_the_difference():
    student, teacher = random_units(2, 30, 8)
    queue = random_units(2, 5, 8)[0]
    published = queue_divergence(student, teacher, queue)
    assert torch.equal(queue_divergence(student, teacher, queue, 0.07), published)
    assert (queue_divergence(student, teacher, queue, 0.7) < published).all()
    for temperature in (0.07, 0.7):
        loss = KNOWN.loss("relation", beta=2.0, temperature=temperature)
        expected = relation_divergence(student[None], teacher[None], temperature).mean()
        assert torch.allclose(loss(student[None], teacher[None]), expected, rtol=1e-4)
    both = KNOWN.loss("0.5 relation + 0.5 mse", beta=2.0, temperature=0.7)
    assert both.reads_temperature
    assert both.terms[0][1].temperature == 0.7


def test_a_queue_holds_the_newest_whatever_the_batches():
    summaries = torch.arange(1.0, 7.0)[:, None]
    queue = torch.zeros(4, 1)
    for batch in summaries.split(2):
        queue = pushed(queue, batch)
    assert queue.flatten().tolist() == [5, 6, 3, 4]
    assert pushed(queue, summaries).flatten().tolist() == [1, 2, 3, 4]


def test_the_summaries_of_a_step_enter_the_queue_once_it_is_taken():
    queue = SummaryQueue(2)
    assert queue.rows.shape == (QUEUE, 2)
    step = torch.tensor([[3.0, 0], [0, 2], [0, -4], [-1, 0]])
    for _ in range(2):  # The first one is a trial that is not taken.
        queue.begin(micro_batches=2)
        queue.take(queue.placed(step[:2]) + queue.placed(step[2:]))
        assert queue.now[:5].tolist() == [[1, 0], [0, 1], [0, -1], [-1, 0], [0, 0]]
        with torch.no_grad():
            assert not queue.now.any(), "what teaches nothing sees the queue of before"
    queue.move()
    queue.begin(micro_batches=1)
    assert queue.now[3:5].tolist() == [[-1, 0], [0, 0]]
    many = queue.placed(torch.ones(QUEUE + 3, 2))
    assert many.shape == (QUEUE * 2,)
