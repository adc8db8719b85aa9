"""What differs between nodes is named, and the nodes that differ from most."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fd_large.engine import node_consistency
from fd_large.engine.node_consistency import (
    Fact,
    check,
    code_hash,
    compare,
    hardware,
    software,
    weights_digest,
)
from fd_large.errors import DataError, LaunchError, WeightsError
from fd_large.ranks import distributed
from fd_large.runtime import run_folder
from fd_large.weights.resolve import Sources


def node(name, code="abc", images="7 images"):
    return name, {
        "code": Fact(code, "nodes: different code", "Use one checkout", LaunchError),
        "images": Fact(images, "data.root: other images", "Copy them", DataError),
    }


def test_alike_nodes_pass():
    compare([node("a"), node("b"), ("b", {})])


def test_the_nodes_that_differ_from_most_are_named():
    with pytest.raises(LaunchError) as caught:
        compare([node("a"), node("b", code="xyz"), node("c"), node("d", "xyz", "6 images")])
    message = str(caught.value)
    assert re.match(r"nodes: .*got xyz on b, d \(.*images\), expected abc .*on a\. Use", message)
    with pytest.raises(DataError, match=r"6 .* on d"):
        compare([node("a"), node("b"), node("c"), node("d", images="6 images")])


def test_of_many_nodes_some_are_named():
    others = [node(f"n{number:02}", code="xyz") for number in range(10)]
    most = [node(f"m{number:02}") for number in range(11)]
    with pytest.raises(LaunchError, match=r"n00, .*n07 and 2 more"):
        compare([*others, *most])


def test_what_a_rank_does_not_know_is_not_compared():
    whole, other = node("a"), node("b", images="6 images")
    del other[1]["images"]
    compare([whole, other])


def test_this_process_has_code_and_packages():
    facts = software()
    assert {"code", "Python", "torch", "deepspeed"} <= facts.keys()
    assert code_hash()[:8] in facts["code"].value


def test_a_digest_of_a_file(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, last in ((file, 0.0), (other, 1.0)):
        save_file({"weight": torch.tensor([0.0] * 1000 + [last])}, path)
    digest, again, another = (weights_digest(str(f), Sources()) for f in (file, file, other))
    assert digest == again != another
    for without_a_file in ("", "random"):
        assert weights_digest(without_a_file, Sources()) == ""
    with pytest.raises(WeightsError):
        weights_digest(str(tmp_path / "c.safetensors"), Sources())


def test_files_of_the_users_own_are_the_same_on_all_nodes(tmp_path, monkeypatch):
    class Images(list):
        fingerprint = "0" * 16

    def nodes(own, **other):
        # Errors are gathered as well.
        is_fact = isinstance(own[-1], dict)
        return [own, ("b", {**own[1], **other}), own] if is_fact else [own]

    source = "module:/own/cosine.py:cosine"
    monkeypatch.setattr(distributed, "gather_objects", nodes)
    check(Images(), {}, Sources(), {source: "abc"})
    changed = Fact("the hash xyz", f"{source}: other files", "Copy it", LaunchError)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: nodes(own, **{source: changed}))
    with pytest.raises(LaunchError, match=r"cosine\.py.* on b"):
        check(Images(), {}, Sources(), {source: "abc"})


def test_only_the_first_rank_of_a_node_reads_files(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    for name in ("software", "weights_digest"):
        monkeypatch.setattr(f"fd_large.engine.node_consistency.{name}", None)
    check(Images(), {"teacher.source": str(tmp_path / "gone.pt")}, Sources())


class Images(list):
    """Images that the nodes compare."""

    fingerprint = "0123456789abcdef"


def test_a_card_is_compared_with_what_drives_it(monkeypatch):
    card = SimpleNamespace(total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(node_consistency, "_driver", lambda: "570.86.15")
    facts = hardware(torch.device("cuda", 0))
    assert {name: fact.value for name, fact in facts.items()} == {
        "card": "NVIDIA H100 80GB HBM3, 85 GB",
        "CUDA": "12.8",
        "NCCL": "2.27.5",
        "driver": "570.86.15",
    }
    with pytest.raises(LaunchError, match=r"no GPU on b.* NVIDIA H100"):
        compare([("a", facts), ("a", facts), ("b", hardware(torch.device("cpu")))])


def test_another_driver_is_said_and_another_triton_stops(monkeypatch, caplog):
    driver = {"driver": Fact("570.86.15", "nodes: different drivers", "Look there", None)}
    other = {"driver": driver["driver"]._replace(value="550.54.14")}
    compare([("a", driver), ("b", other), ("c", driver)])
    assert "got 550.54.14 on b, expected 570.86.15 as on a" in caplog.text
    assert "triton" in software()


def test_git_is_asked_once_a_process(monkeypatch):
    run_folder.source_commit.cache_clear()
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="0123456789\n")

    monkeypatch.setattr(run_folder.subprocess, "run", run)
    try:
        assert "012345678" in software()["code"].value
        software()
        assert len(asked) == 1
    finally:
        run_folder.source_commit.cache_clear()
