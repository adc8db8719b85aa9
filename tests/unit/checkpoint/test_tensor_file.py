"""Files of tensors: the library's format, read in parts, with checksums of parts."""

import json
import os
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from fd_large.checkpoint import tensor_file
from fd_large.checkpoint.tensor_file import TensorFile

TENSORS = {
    "master.b": torch.randn(7),
    "master.a": torch.randn(5),
    "ema.a": torch.randn(5),
    "exp_avg.a": torch.randn(6).bfloat16(),
    "count.a": torch.arange(3),
    "exp_avg_sq.ä": torch.randn(1),
}


def test_the_library_reads_what_is_written_and_writes_the_same(tmp_path):
    own, library = tmp_path / "own", tmp_path / "library"
    for tensors in (TENSORS, {k: t for k, t in TENSORS.items() if t.dtype == torch.float32}, {}):
        tensor_file.write(own, tensors)
        found = load_file(own)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    floats = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype == torch.float32}
    tensor_file.write(own, floats)
    save_file(floats, library)
    assert own.read_bytes() == library.read_bytes()


def test_elements_of_a_tensor_whoever_wrote_it(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"by": "the library"})
    file = TensorFile(tmp_path / "file")
    for name, start, stop in (("master.b", 2, 6), ("exp_avg.a", 1, 3), ("count.a", 0, 3)):
        out = torch.empty(stop - start)
        file.read_into(out, name, start)
        assert torch.equal(out, TENSORS[name][start:stop].float())


def test_checksums_are_of_the_bytes(tmp_path):
    sums = tensor_file.write(tmp_path / "file", TENSORS)
    content = (tmp_path / "file").read_bytes()
    assert sums.file == f"{zlib.crc32(content):08x}"
    begin = 8 + int.from_bytes(content[:8], "little")
    assert sums.header == f"{zlib.crc32(content[:begin]):08x}"
    masters = b"".join(TENSORS[f"master.{name}"].numpy().tobytes() for name in "ab")
    assert sums.kinds["master"] == f"{zlib.crc32(masters):08x}"
    assert sums.kinds.keys() == {"master", "ema", "exp_avg", "exp_avg_sq", "count"}
    again = TensorFile(tmp_path / "file").checksum([*sums.kinds, "none"])
    assert (again.header, again.kinds) == (sums.header, sums.kinds)


def test_files_with_the_same_header_share_its_table(tmp_path):
    headers = {}
    for name in "abc":
        tensor_file.write(tmp_path / name, {"master.x": torch.randn(3 if name == "c" else 2)})
    files = [TensorFile(tmp_path / name, headers) for name in "abc"]
    assert files[0].places is files[1].places
    assert len(headers) == 2


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_is_what_the_users_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        tensor_file.write(tmp_path / "file", TENSORS)
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    "content",
    [
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}"[::-1],
        (len(json.dumps({"a": 1}))).to_bytes(8, "little") + json.dumps({"a": 1}).encode(),
    ],
)
def test_what_is_no_such_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        TensorFile(tmp_path / "file")


def test_a_file_that_ends_early_is_an_error_of_the_system(tmp_path):
    tensor_file.write(tmp_path / "file", TENSORS)
    file = TensorFile(tmp_path / "file")
    os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size - 8)
    last = max(file.places, key=lambda name: file.places[name].stop)
    with pytest.raises(OSError, match="ends early"):
        file.read_into(torch.empty(TENSORS[last].numel()), last, 0)
