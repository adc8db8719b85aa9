"""Files of DeepSpeed's own format are read without running code of theirs."""

from __future__ import annotations

import os
from pickle import UnpicklingError

import pytest
import torch

from fd_large.engine.deepspeed_checkpoints import _culprit, _without_code
from fd_large.engine.zero.start import deepspeed

NAMES = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
"""What a user may have set of torch's own, for the restricted load and for the other."""


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "users",
    [{}, {NAMES[0]: "1"}, {NAMES[1]: "1"}],
    ids=["nothing", "restricted", "unrestricted"],
)
def test_what_deepspeed_reads_runs_no_code(users, tmp_path, monkeypatch):
    """DeepSpeed's reader asks torch for the load that runs code, and gets the other."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    scaler = deepspeed.runtime.fp16.loss_scaler.LossScaler(scale=2.0)
    records = {"loss_scaler": scaler, "tensors": torch.ones(2), "shapes": [torch.Size([2])]}
    torch.save(records, tmp_path / "sound.pt")
    torch.save({"module": Bomb(tmp_path / "ran")}, tmp_path / "evil.pt")
    reader = deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine()
    (tmp_path / "ran").unlink(missing_ok=True)
    with _without_code():
        found = reader.load(tmp_path / "sound.pt")
        with pytest.raises(UnpicklingError) as caught:
            reader.load(tmp_path / "evil.pt")
    assert found["loss_scaler"].cur_scale == 2.0
    assert _culprit(caught.value).endswith("open")
    assert not (tmp_path / "ran").exists()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == users
