from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from coco import annotation
from pycocotools import mask as their_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fd_large.errors import DataError
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.annotations import open_coco
from fd_large.tasks.detection.scores import scoring
from fd_large.tasks.detection.scores.results import read_results
from fd_large.tasks.detection.scores.scoring import (
    NUMBERS,
    read_ground_truth,
    redrawn_aps,
    score,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
KEYS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}


@pytest.fixture(scope="module")
def val(coco_tiny):
    return read_ground_truth(str(coco_tiny / "annotations" / "instances_val.json"))


def official(ground_truth, results, kind) -> COCOeval:
    """The evaluation of pycocotools; for masks without boxes, whose area would count."""
    iou_type, key = KEYS[kind]
    truth = COCO()
    truth.dataset = copy.deepcopy(ground_truth)
    truth.createIndex()
    kept = ("image_id", "category_id", "score", key)
    found = truth.loadRes([{name: copy.deepcopy(r[name]) for name in kept} for r in results])
    evaluation = COCOeval(truth, found, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def as_detections(coco_tiny) -> list[dict]:
    """The ground truth of coco_tiny, crowds left out, through our own reading and encoding."""
    opened = open_coco(str(coco_tiny), "val")
    results = []
    for index in range(len(opened)):
        target = opened.target(index)
        packed = masks.encode(target.masks.numpy())
        for box, label, rle in zip(target.boxes.numpy(), target.labels, packed, strict=True):
            left, top, right, bottom = (float(side) for side in box)
            results.append(
                {
                    "image_id": target.image_id,
                    "category_id": opened.category_ids[int(label)],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": 1.0,
                    "segmentation": rle,
                }
            )
    return results


def perturbed(ground_truth, results, seed: int) -> list[dict]:
    """Shifted, resized, doubled, dropped, of other classes, inside crowds, with equal scores."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    categories = [category["id"] for category in ground_truth["categories"]]
    found = []
    for result in results:
        if rng.random() < 0.15:
            continue
        height, width = sizes[result["image_id"]]
        for _ in range(1 + int(rng.random() < 0.2)):
            shift = rng.normal(0, 0.06, 4) * np.tile(result["bbox"][2:], 2)
            box = np.array(result["bbox"]) + shift
            box[2:] = np.maximum(box[2:], 1)
            mask = np.roll(
                masks.decompress(result["segmentation"]["counts"].encode(), height, width),
                tuple(int(step) for step in rng.integers(-4, 5, 2)),
                (0, 1),
            )
            other = rng.random() < 0.1
            found.append(
                {
                    **result,
                    "bbox": box.tolist(),
                    "score": round(float(rng.random()), 1),  # many are equal
                    "category_id": int(rng.choice(categories)) if other else result["category_id"],
                    "segmentation": masks.encode(mask[None])[0],
                }
            )
    for entry in ground_truth["annotations"]:
        if entry["iscrowd"]:
            left, top, width, height = entry["bbox"]
            size = sizes[entry["image_id"]]
            for part in rng.random((6, 2)) * 0.6:
                box = [left + part[0] * width, top + part[1] * height, 0.3 * width, 0.3 * height]
                mask = np.zeros(size, dtype=np.uint8)
                y, x = int(box[1]), int(box[0])
                mask[y : y + int(box[3]) + 1, x : x + int(box[2]) + 1] = 1
                found.append(
                    {
                        "image_id": entry["image_id"],
                        "category_id": entry["category_id"],
                        "bbox": box,
                        "score": 0.9,
                        "segmentation": masks.encode(mask[None])[0],
                    }
                )
    return found


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_cocos_own_figures_of_its_fake_detections(coco_tiny, val, kind):
    expected = json.loads((coco_tiny / "eval" / "expected.json").read_text())
    assert expected["stats_order"] == list(NUMBERS)
    name = KEYS[kind][0]
    all_100 = read_ground_truth(str(coco_tiny / "eval" / "instances_val2014_100.json"))
    results = read_results(coco_tiny / "eval" / f"fake{name}100_results.json")
    assert len(results) == expected[name]["detections_100"]
    numbers = list(score(all_100, results).kinds[kind].numbers.values())
    np.testing.assert_allclose(numbers, expected[name]["pycocotools_100"], atol=1e-6)
    np.testing.assert_allclose(numbers, expected[name]["official_text"], atol=5.1e-4)

    here = {image["id"] for image in val["images"]}
    results = [result for result in results if result["image_id"] in here]
    assert len(results) == expected[name]["detections_54"]
    numbers = list(score(val, results).kinds[kind].numbers.values())
    np.testing.assert_allclose(numbers, expected[name]["pycocotools_54"], atol=1e-6)


def test_ground_truth_fed_back_is_perfect(coco_tiny, val):
    scores = score(val, as_detections(coco_tiny))
    for kind in ("box", "mask"):
        numbers = scores.kinds[kind].numbers
        assert [numbers[name] for name in NUMBERS[:6]] == pytest.approx([1] * 6, abs=1e-9)
        assert numbers["AR100"] == pytest.approx(1, abs=1e-9)
        assert all(curve[0] == pytest.approx(1) for curve in scores.kinds[kind].curves.values())
        occurs = [of_class for of_class in scores.kinds[kind].classes if of_class.ap is not None]
        assert len(occurs) == 57
        assert all(of_class.ap == pytest.approx(1) for of_class in occurs)


def test_perturbed_ground_truth_scores_as_with_pycocotools(coco_tiny, val, capsys, monkeypatch):
    results = perturbed(val, as_detections(coco_tiny), 0)
    scores = score(val, results)
    # As a large split is scored: some classes at a time, here 7 of 80.
    monkeypatch.setattr(scoring, "PAIRS_AT_ONCE", 7 * len(val["images"]) + 1)
    assert score(val, results) == scores
    for kind in ("box", "mask"):
        theirs = official(val, results, kind)
        ours = scores.kinds[kind]
        assert 0.1 < theirs.stats[0] < 0.9
        np.testing.assert_allclose(list(ours.numbers.values()), theirs.stats, atol=1e-6)
        precision = theirs.eval["precision"][:, :, :, 0, 2]
        occurs = []
        for place, of_class in enumerate(ours.classes):
            of_theirs = precision[:, :, place]
            if (of_theirs > -1).any():
                occurs.append(place)
                assert of_class.ap == pytest.approx(of_theirs.mean(), abs=1e-6)
                assert of_class.ap50 == pytest.approx(of_theirs[0].mean(), abs=1e-6)
            else:
                assert of_class.ap is None
        for iou, number in ((0.5, 0), (0.75, 5)):
            expected = precision[number][:, occurs].mean(1)
            np.testing.assert_allclose(ours.curves[iou], expected, atol=1e-6)
    capsys.readouterr()


def test_a_draw_scores_as_if_its_images_were_there_as_often(coco_tiny, val, monkeypatch):
    results = perturbed(val, as_detections(coco_tiny), 0)
    scores = score(val, results)
    numbers = sorted(image["id"] for image in val["images"])
    as_they_are = np.ones((1, len(numbers)), np.int64)
    drawn = np.random.default_rng(1).multinomial(len(numbers), np.full(54, 1 / 54), 1)
    monkeypatch.setattr(scoring, "redraws", lambda count: np.concatenate([as_they_are, drawn]))
    found = redrawn_aps(val, results, scores)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "MOST_REDRAWN", 54 * 80 - 1)
        assert redrawn_aps(val, results, scores) == {}
    # Copies of images with numbers of their own, and of what is in them.
    images, objects, detections = [], [], []
    for number, count in zip(numbers, drawn[0], strict=True):
        for copy_ in range(count):
            own = 1000 * len(images) + copy_
            images += [i | {"id": own} for i in val["images"] if i["id"] == number]
            for entries, copies in ((val["annotations"], objects), (results, detections)):
                copies += [e | {"image_id": own} for e in entries if e["image_id"] == number]
    objects = [entry | {"id": place} for place, entry in enumerate(objects, 1)]
    again = score({**val, "images": images, "annotations": objects}, detections)
    for kind in ("box", "mask"):
        ap, aps = found[f"{kind}_AP"]
        assert ap == pytest.approx(scores.kinds[kind].numbers["AP"])
        assert aps == pytest.approx([ap, again.kinds[kind].numbers["AP"]])
        assert abs(aps[1] - ap) > 1e-3


def test_crowds_are_neither_right_nor_wrong(val):
    crowd = next(a for a in val["annotations"] if a["iscrowd"])
    left, top, width, height = crowd["bbox"]
    truth = {**val, "annotations": [crowd, annotation(2, crowd["image_id"], [0, 0, 9, 9])]}
    truth["annotations"][1]["category_id"] = crowd["category_id"]
    right = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "score": 0.5}
    right["bbox"] = [0, 0, 9, 9]
    in_crowd = {**right, "bbox": [left, top, width / 3, height / 3], "score": 0.9}
    beside = {**right, "bbox": [100, 0, 9, 9], "score": 0.9}
    assert score(truth, [right, in_crowd]).kinds["box"].numbers["AP"] == pytest.approx(1)
    assert score(truth, [right, beside]).kinds["box"].numbers["AP"] == pytest.approx(0.5, abs=0.01)


def test_an_annotation_with_id_0_is_found_like_any_other(tmp_path):
    truth = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "annotations": [annotation(0, 1, [5, 5, 20, 20])],
        "categories": [{"id": 3, "name": "cat"}],
    }
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    results = [{"image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20], "score": 0.4}]
    assert score(read_ground_truth(str(path)), results).kinds["box"].numbers["AP"] == 1


def test_no_detections_and_nothing_to_detect(val):
    for kind in score(val, []).kinds.values():
        assert set(kind.numbers.values()) == {0.0}
    nothing = {**val, "annotations": []}
    kinds = score(nothing, []).kinds
    assert list(kinds) == ["box"]
    assert set(kinds["box"].numbers.values()) == {-1.0}
    assert kinds["box"].curves == {0.5: (), 0.75: ()}


def test_scoring_changes_neither_truth_nor_results(coco_tiny):
    val = read_ground_truth(str(coco_tiny / "annotations" / "instances_val.json"))
    results = as_detections(coco_tiny)[:30]
    before = copy.deepcopy((val, results))
    score(val, results)
    assert (val, results) == before


def test_a_mask_counts_by_its_own_area(val):
    """Not by its box's, which pycocotools takes where a result has both."""
    image = val["images"][0]
    size = (image["height"], image["width"])
    thin = np.zeros(size, dtype=np.uint8)
    thin[range(100), range(100)] = 1  # area 100, box 100 x 100
    rle = masks.encode(thin[None])[0]
    category = val["categories"][0]["id"]
    truth = {**val, "annotations": [annotation(1, image["id"], [0, 0, 40, 40])]}
    truth["annotations"][0]["category_id"] = category
    result = {"image_id": image["id"], "category_id": category, "score": 0.9}
    square = {**result, "bbox": [0, 0, 40, 40], "score": 0.5}
    filled = np.zeros(size, dtype=np.uint8)
    filled[:40, :40] = 1
    square["segmentation"] = masks.encode(filled[None])[0]
    false = {**result, "bbox": [0, 0, 100, 100], "segmentation": rle}
    numbers = score(truth, [square, false]).kinds["mask"].numbers
    assert numbers["APm"] == pytest.approx(1)  # the false one is small: it does not count here
    assert numbers["AP"] == pytest.approx(0.5, abs=0.01)
    assert their_masks.area(rle) == 100


def test_results_of_other_data_are_refused_with_the_reason(val):
    shown = val["annotations"][0]
    image = next(image for image in val["images"] if image["id"] == shown["image_id"])
    good = {key: shown[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
    small = masks.encode(np.ones((1, 3, 3), dtype=np.uint8))[0]
    damaged = {"size": [image["height"], image["width"]], "counts": "abc"}
    for changes, message in (
        ({"image_id": 5}, r"got 1 such image_id \(5\).*Set --annotations"),
        ({"category_id": 0}, "category_id 0.*not labels that count from 0"),
        ({"segmentation": small}, r"got \[3, 3\].*own pixels"),
        ({"segmentation": damaged}, "a mask that cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            score(val, [{**good, **changes}])
    only_mask = {key: good[key] for key in good if key != "bbox"} | {"segmentation": damaged}
    with pytest.raises(DataError, match=r"^detections: nothing"):
        score(val, [good, only_mask])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not JSON"),
        ("{}", "no list 'images'"),
        ('{"images": [], "annotations": [{"image_id": 1}], "categories": []}', "without 'bbox'"),
        ('{"images": [{}], "annotations": [], "categories": []}', "without 'id'"),
    ],
)
def test_annotations_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"{message}.*[sS]et --annotations"):
        read_ground_truth(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"^annotations: .*b\.json"):
        read_ground_truth(str(tmp_path / "b.json"))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("images", {"id": 2**70}),
        ("categories", {"id": 2**70}),
        ("annotations", {"bbox": [1, 1, 10**400, 2]}),
        ("annotations", {"area": 10**400}),
        ("annotations", {"image_id": 2**70}),
    ],
)
def test_truth_of_numbers_that_nothing_holds_is_refused(tmp_path, part, changes):
    truth = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 3, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    read_ground_truth(str(tmp_path / "truth.json"))
    truth[part][0] |= changes
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match=r"^annotations: .*--annotations"):
        read_ground_truth(str(tmp_path / "truth.json"))
