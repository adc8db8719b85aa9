from __future__ import annotations

from coco import CATEGORIES, annotation

from fd_large.tasks.detection.scores.error_analysis import compare, worst

BOX = [10.0, 10.0, 20.0, 20.0]


def truth(*annotations) -> dict:
    images = [{"id": number, "height": 100, "width": 100} for number in (1, 2, 3)]
    return {"images": images, "annotations": list(annotations), "categories": CATEGORIES}


def found(image: int, box=BOX, score: float = 0.9, category: int = 3) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_right_false_and_missed():
    of = truth(annotation(1, 1, BOX), annotation(2, 1, [50, 50, 20, 20]), annotation(3, 2, BOX))
    results = [
        found(1),
        found(1, [11, 11, 20, 20], 0.8),  # the object is taken
        found(1, [70, 0, 20, 20], 0.7),
        found(1, [50, 50, 20, 20], 0.4),  # below the score
        found(2, category=7),
    ]
    compared = compare(of, results)
    assert compared[1].missed == [False, True]
    assert compared[1].false == [False, True, True]
    assert [r["score"] for r in compared[1].seen] == [0.9, 0.8, 0.7]
    assert (compared[2].missed, compared[2].false) == ([True], [True])
    assert (compared[3].missed, compared[3].false) == ([], [])


def test_a_detection_takes_the_object_that_it_covers_best():
    of = truth(annotation(1, 1, BOX), annotation(2, 1, [10, 10, 24, 20]))
    compared = compare(of, [found(1, [10, 10, 24, 20]), found(1, BOX, 0.8)])
    assert compared[1].missed == [False, False]
    assert compared[1].false == [False, False]


def test_a_detection_in_a_crowd_of_its_class_is_neither():
    of = truth(annotation(1, 1, [0, 0, 90, 90], iscrowd=1))
    compared = compare(of, [found(1), found(1, category=7, score=0.8), found(1, score=0.7)])
    assert compared[1].objects == []
    assert compared[1].false == [False, True, False]


def test_the_worst_pictures_come_first_and_good_ones_not_at_all():
    of = truth(annotation(1, 1, BOX), annotation(2, 2, BOX), annotation(3, 2, [50, 50, 20, 20]))
    compared = compare(of, [found(1)])
    assert worst(compared, 3) == [2]
    assert worst(compare(of, []), 3) == [2, 1]
    assert worst(compare(of, []), 1) == [2]
