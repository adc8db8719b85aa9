"""An optimiser of the user's own at every ZeRO stage, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit.engine.conftest import CONFIGS, Brightness, batch_of
from unit.engine.zero.test_state import restore, step, stored

from fd_large import doors
from fd_large.engine.ema import Ema
from fd_large.engine.forward_backward import prepared
from fd_large.engine.zero import optimizer, partition
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import moments_of, parameter_groups
from fd_large.errors import ConfigError
from fd_large.recipes.sections import Optim

OWN = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(state["exp_avg"].lerp(p.grad, 1 - beta1).sign_(), alpha=lr)
                state["exp_avg"] = state["exp_avg"].lerp(p.grad, 1 - beta2)

class Lamb(Lion):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * p.norm() / p.grad.norm(), alpha=group["lr"])

class Reserved(Lion):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["master"] = torch.zeros_like(p)

class Counts(Lion):
    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

class Schedule(Lion):
    def step(self, closure=None):
        self.param_groups[0]["lr"] *= 0.5

class Clipping(Lion):
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p in [p for group in self.param_groups for p in group["params"]]:
            p.data.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])

class Raises(Lion):
    def step(self, closure=None):
        raise KeyError("momentum")

def broken(groups, lr):
    return [groups, lr]

Adagrad, NAdam, RMSprop = torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RMSprop
AdamW, LBFGS, Rprop = torch.optim.AdamW, torch.optim.LBFGS, torch.optim.Rprop

def sgd(groups, lr):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)

class Undecayed(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        pass
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def own(path):
    """Returns name -> the recipe's section with that optimiser."""
    doors.allow(path)
    return lambda name, **fields: Optim(name=f"module:{path}:{name}", **fields)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((config, "Lion") for config in CONFIGS),
        *((config, name) for config in ("whole", "sharded") for name in ("RMSprop", "sgd")),
    ],
)
def test_it_goes_on_to_the_bit_from_what_was_stored(make_engine, own, config, name):
    first = make_engine(config, optim=own(name))
    average, rates = Ema(first, 0.5), by_layer(first, 0.5)
    rates.at_scale = lambda scale: 1e-3 * scale
    for number in range(3):
        step(first, number)
        average.update()
    shards = stored(first)
    kinds = {key.partition(".")[0] for key in shards}
    assert kinds == {"master", "ema", *moments_of(own(name))}
    second = make_engine(config, optim=own(name), seed=1)
    Ema(second, 0.5)
    by_layer(second, 0.5).at_scale = rates.at_scale
    restore(second, shards, finished=3, steps=3, ema=True)
    assert all(torch.equal(value, shards[key]) for key, value in stored(second).items())
    assert [step(first, 3), step(first, 4)] == [step(second, 3), step(second, 4)]
    after = stored(first)
    assert not torch.equal(after["master.head.weight"], shards["master.head.weight"])
    assert all(
        torch.equal(value, after[key])
        for key, value in stored(second).items()
        if not key.startswith("ema.")
    )


@pytest.mark.parametrize("config", ["whole", "sharded"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_lion_steps_as_in_a_plain_process(make_engine, own, config, decay):
    engine = make_engine(config, optim=own("Lion"))
    if rates := by_layer(engine, decay):
        rates.at_scale = lambda scale: 1e-2 * scale
    plain = partition.build(Brightness, {}, partitioned=False, seed=0)
    decayed = {id(p) for p in parameter_groups(plain, 1.0)[0]["params"]}
    groups = [
        {
            "params": [parameter],
            "lr": 1e-2 * plain.layer_scale(name, decay),
            "weight_decay": 0.05 * (id(parameter) in decayed),
        }
        for name, parameter in plain.named_parameters()
    ]
    reference = doors.load(own("Lion").name, kind="optimisers", where="")(groups)
    for number in range(3):
        step(engine, number)
        reference.zero_grad()
        plain(**prepared(plain, batch_of(number), 0))[0].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    for key, values in stored(engine).items():
        if key.startswith("master."):
            expected = plain.get_parameter(key.removeprefix("master.")).detach()
            # The sign of a gradient near 0 may differ by one step.
            close = (values.view(-1) - expected.view(-1)).abs() < 1e-6
            assert close.float().mean() > 0.98, key


def test_what_is_kept_of_each_parameter(own):
    assert moments_of(Optim()) == ("exp_avg", "exp_avg_sq")
    assert moments_of(own("Lion")) == ("exp_avg",)
    assert moments_of(own("AdamW")) == ("exp_avg", "exp_avg_sq")
    assert moments_of(own("sgd")) == ("momentum_buffer",)
    assert moments_of(own("Undecayed", weight_decay=0.0)) == ()


def test_a_built_in_one_is_a_line_in_its_table(monkeypatch, own, make_engine):
    lion = doors.load(own("Lion").name, kind="optimisers", where="")
    monkeypatch.setitem(optimizer.OPTIMISERS, "lion", lion)
    assert moments_of(Optim(name="lion")) == ("exp_avg",)
    engine = make_engine(optim=Optim(name="lion"))
    step(engine, 0)
    assert {key.partition(".")[0] for key in stored(engine)} == {"master", "exp_avg"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Lamb", "element by element"),
        ("Clipping", "element by element"),
        ("LBFGS", "cannot make a step"),
        ("Adagrad", "before the first step"),
        ("NAdam", "'mu_product'"),
        ("Reserved", "'master'"),
        ("Schedule", "changes lr"),
        ("broken", "list"),
        ("Raises", "own.py line"),
        ("Undecayed", "weight decay"),
        ("lion", "nearest: Lion"),
    ],
)
def test_what_cannot_be_trained_or_stored_is_refused(own, name, part):
    with pytest.raises(ConfigError, match=r"optim\.name") as caught:
        moments_of(own(name))
    assert part in str(caught.value)


def test_muon_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"optim\.name: Muon"):
        moments_of(Optim(name="muon"))


def test_fields_of_adamw_are_refused_beside_another(own):
    for field in ({"betas": (0.9, 0.95)}, {"eps": 1e-6}, {"fused": "torch"}):
        with pytest.raises(ConfigError, match=rf"optim\.{next(iter(field))}"):
            own("Lion", **field)
