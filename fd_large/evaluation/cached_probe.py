"""Linear probe of `--protocol cached`, which trains in minutes on features of centre crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fd_large.evaluation.frozen import Classified, FrozenFeatures, FrozenFlags, of_features
from fd_large.evaluation.protocol import Repeated
from fd_large.recipes.fields import at_least, require

if TYPE_CHECKING:
    from fd_large.probes.linear import Probe


@dataclass(frozen=True, kw_only=True)
class ProbeFlags(FrozenFlags, Repeated):
    """Flags of the linear probe that is trained on stored features."""

    # Learning rates of the linear probe per 256 images. Each is tried, and the accuracy on a
    # held-out tenth of the training images chooses one.
    probe_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    # Number of epochs of the linear probe.
    probe_epochs: int = 30

    def __post_init__(self) -> None:
        at_least("--probe_epochs", self.probe_epochs, 1, "epochs")
        require(
            bool(self.probe_rates) and min(self.probe_rates) > 0,
            "--probe_rates: invalid learning rates",
            self.probe_rates,
            "numbers above 0",
        )


def _probe(flags: Any, seed: int = 0) -> Probe:
    from fd_large.probes.linear import Probe

    return Probe(rates=flags.probe_rates, epochs=flags.probe_epochs, seed=seed)


def _warn(num_train: int, flags: Any) -> None:
    from fd_large.probes import linear

    linear.warn_of_few_steps(num_train, _probe(flags))


def _classify(features: FrozenFeatures) -> Classified:
    from fd_large.probes import linear
    from fd_large.ranks import distributed

    probe = _probe(features.flags, features.seed)
    # Every rank trains the whole probe.
    num_images = linear.work(len(features.train.labels), probe) * distributed.world_size()
    with features.working(f"probe, seed {features.seed}", num_images) as progress:
        outcome = linear.evaluate(
            features.train,
            features.test,
            num_classes=len(features.classes),
            probe=probe,
            progress=progress,
        )
    details = {"rate": outcome.rate, "held_out": list(outcome.held_out)}
    return Classified(outcome.predicted, details)


CACHED_PROBE = of_features(
    "linear",
    "Linear probe",
    _classify,
    flags=ProbeFlags,
    # A distillation may improve one of these features and worsen another.
    pools=("mean", "cls", "both"),
    settings={"rates": "probe_rates", "epochs": "probe_epochs"},
    check=_warn,
)
