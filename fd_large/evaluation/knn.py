"""Protocol `knn`, which classifies an image by the classes of the most similar training images."""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.evaluation.frozen import Classified, FrozenFeatures, FrozenFlags, of_features
from fd_large.recipes.fields import at_least, positive


@dataclass(frozen=True, kw_only=True)
class KnnFlags(FrozenFlags):
    """Flags of k-NN."""

    # Number of nearest neighbours that vote in k-NN, 1 or more.
    k: int = 20
    # Temperature of the votes in k-NN. The weight of a neighbour's vote is exp(cosine similarity /
    # temperature).
    temperature: float = 0.07

    def __post_init__(self) -> None:
        at_least("--k", self.k, 1, "neighbours")
        positive("--temperature", self.temperature)


def _classify(features: FrozenFeatures) -> Classified:
    from fd_large.probes import knn

    with features.working(f"k-NN of {features.pool}", len(features.test.labels)) as progress:
        return Classified(
            knn.classify(
                features.train,
                features.test,
                num_classes=len(features.classes),
                k=features.flags.k,
                temperature=features.flags.temperature,
                progress=progress,
            )
        )


# DINO's published figures are of the class token.
KNN = of_features("knn", "k-NN", _classify, flags=KnnFlags, pools=("mean", "cls"))
