"""Published numbers with the kernels, where Triton runs; started by test_triton.py."""

from __future__ import annotations

import oracles
import pytest
from oracle_files import FILES

# A model of each kind, as short as they are; in Triton's interpreter others take minutes, and
# those of the sweep ten seconds.
SHORT = (
    "fd_vit_no_cls",
    "fd_vit_block_rpb_ape",
    "fd_teacher_dino",
    "fd_teacher_esvit_s3",
    "fd_vit_shared_rpb_b_kbias",
    "swinv2_official_a",
)
SWEEP = ("fd_teacher_esvit_s3", "swinv2_official_a")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.sweep if n in SWEEP else ()) for n in SHORT],
)
def test_oracle(name, device, chosen):
    verdict = oracles.check_file(FILES / f"{name}.json")
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
    assert ("window_attention", "triton") in chosen
