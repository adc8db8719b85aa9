"""The raw material of the feature panel."""

import numpy
import pytest

from fd_large.tasks.distillation.feature_panel import FeaturePanel


def panel(width=5):
    generator = numpy.random.default_rng(0)
    return {
        "images": generator.integers(0, 256, (2, 32, 32, 3), dtype=numpy.uint8),
        "teacher": generator.normal(size=(2, 4, 4, width)).astype(numpy.float32),
        "student": generator.normal(size=(2, 4, 4, width)).astype(numpy.float32),
    }


def test_before_and_after_are_kept_and_the_newest_wins(make_setting, tmp_path):
    hook = FeaturePanel()
    hook.on_start(make_setting())
    hook.on_features(0, panel())
    hook.on_features(5, panel())
    hook.on_features(10, panel(width=6))
    files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert files == ["features_after.npz", "features_before.npz"]
    with numpy.load(tmp_path / "pictures" / "features_before.npz") as before:
        assert before["update"] == 0
        assert (before["images"] == panel()["images"]).all()
        assert (before["student"] == panel()["student"]).all()
    with numpy.load(tmp_path / "pictures" / "features_after.npz") as after:
        assert after["update"] == 10
        assert after["teacher"].shape == (2, 4, 4, 6)


def test_a_teacher_may_be_called_a_student(make_setting, tmp_path):
    hook = FeaturePanel()
    hook.on_start(make_setting())
    hook.on_features(0, {f"{n}_old_student" if n != "images" else n: m for n, m in panel().items()})
    assert (tmp_path / "pictures" / "features_before.npz").exists()


def test_maps_that_do_not_fit_are_our_mistake(make_setting):
    hook = FeaturePanel()
    hook.on_start(make_setting())
    with pytest.raises(AssertionError):
        hook.on_features(0, panel() | {"student": panel(width=4)["student"]})


def test_a_start_that_has_lost_the_folder_writes_none(make_setting, tmp_path):
    hook = FeaturePanel()
    hook.on_start(make_setting(owned=lambda: False))
    hook.on_features(0, panel())
    assert not (tmp_path / "pictures").exists()
