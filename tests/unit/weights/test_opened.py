"""The tensors of a file in our names, and what is refused of them."""

from __future__ import annotations

import pytest
import torch
from loading import initial, made
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import fd_swinv2

from fd_large.errors import WeightsError
from fd_large.weights.coverage import Fitted
from fd_large.weights.source import Sources


def test_a_student_starts_from_a_published_file(tmp_path):
    spec, tensors = oracle("fd_vit_shared_rpb_a")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    config = spec["config"]
    fields = {
        "embed_dim": config["embed_dim"],
        "depths": (config["depth"],),
        "num_heads": (config["num_heads"],),
        "patch_size": config["patch_size"],
        "mlp_ratio": config["mlp_ratio"],
    }
    net, _ = initial(tmp_path / "fd.pth", "vit_base_patch16", config["img_size"], **fields)
    assert_matches(net, spec, tensors, "out.final")


def test_a_rectangular_net_is_filled_by_its_shapes(tmp_path):
    """No architecture of ours is rectangular, but the model and the loader are."""
    spec, tensors = oracle("fd_swinv2_d_rect_nonorm_ape")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    net = fd_swinv2(spec["config"])
    weights = Sources().open(tmp_path / "fd.pth")
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    pieces, _ = weights.adapted(weights.found, expected)
    net.load_state_dict(dict(Fitted(pieces, weights.file, expected, what="oracle")))
    assert_matches(net, spec, tensors, "out.final")


def test_tensors_without_numbers_or_of_strange_shapes(tmp_path):
    state, path = made("dino_vit_base_patch16").state_dict(), tmp_path / "net.pth"
    torch.save({name: torch.empty(0) for name in state}, path)
    with pytest.raises(WeightsError, match=r"without numbers.*\(0,\).*ZeRO-3"):
        Sources().open(path)
    name = "patch_embed.proj.weight"
    torch.save({**state, name: state[name].flatten(1)}, path)
    with pytest.raises(WeightsError, match=r"shapes of no vit model; got .*\(32, 192\)"):
        Sources().open(path)
