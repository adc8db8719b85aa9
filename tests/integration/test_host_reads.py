"""A step makes the host read the device once, whatever hooks a run has; and --profile's file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import twin
from launch import read_results, run_ranks
from pictures import write_pictures

PROGRAM = Path(__file__).parent / "programs" / "host_reads.py"


def test_one_read_an_update_and_a_trace_of_those_asked_for(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 40)
    run_dir = tmp_path / "run"
    words = twin.words(
        *(pictures, run_dir, "--optim.max_steps", "7", "--runtime.log_every", "5"),
        *("--optim.layer_decay", "0.8", "--optim.ema_decay", "0.9", "--profile", "2"),
        *("--batch.global_batch_size", "4"),
    )
    run_ranks(PROGRAM, tmp_path, *words, ranks=1, results=tmp_path)
    (found,) = read_results(tmp_path, 1)
    assert found["code"] == 0
    assert sorted(found["reads"]) == [str(update) for update in range(7)]
    # Drop path's draws are made from positions, which are always in host memory.
    on_host = {"random_numbers.random_words"}
    for update, reads in found["reads"].items():
        seen = [read for read in reads if read not in on_host]
        if int(update) + 1 in (5, 7):  # The log step, and the last one.
            assert seen.count("loop._agree") == 1
        else:
            assert seen == ["loop._agree"], update
    share, trace = sorted((run_dir / "profile").iterdir())
    assert share.name == "communication.json"
    assert trace.name == "updates_3_to_4.pt.trace.json.gz"
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    assert {"aten::addmm", "aten::_fused_adamw_"} & names
