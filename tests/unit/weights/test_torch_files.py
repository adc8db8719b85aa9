"""Torch files are read as torch reads them, and nothing in them runs."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch_archives import DATA, NESTED, archive, tensor_pickle, text

from fd_large.errors import WeightsError
from fd_large.weights import torch_files
from fd_large.weights.read import read
from fd_large.weights.unpickle import Passive

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def same(ours, theirs):
    if isinstance(ours, Passive):
        assert isinstance(theirs, set | torch.Size | bytes)
    elif torch.is_tensor(theirs):
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )
        ours, theirs = (
            t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (ours, theirs)
        )
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == theirs


def contents():
    base = torch.arange(24.0).view(4, 6)
    counts = defaultdict(int)
    counts["a"] = 3
    return {
        "model": OrderedDict(
            {
                "whole": base,
                "column": base[:, 2],
                "turned": base.t(),
                "scalar": torch.tensor(3),
                "empty": torch.zeros(0, 5),
                "parameter": nn.Parameter(torch.randn(3)),
                **{str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPES},
            }
        ),
        "optimizer": {"state": {0: {"step": 1}}, "lr": [0.1, (1e-3, None, True)], "text": "\u00e9"},
        "counts": counts,
        "large": 2**80,
        "bytes": b"\x00\xff",
        "size": torch.Size([2, 3]),
        "rng": torch.get_rng_state(),
        "set": {1, 2},
    }


@pytest.mark.parametrize(
    "how",
    [{"_use_new_zipfile_serialization": False}, *({"pickle_protocol": n} for n in (2, 3, 4, 5))],
)
def test_contents_are_what_was_saved(tmp_path, how):
    saved = contents()
    torch.save(saved, tmp_path / "a.pth", **how)
    same(torch_files.load(tmp_path / "a.pth"), saved)


def test_eight_bits_and_one_storage_for_two(tmp_path):
    tensor = torch.arange(6.0)
    torch.save({"a": tensor, "b": tensor[2:], "c": tensor.to(torch.float8_e4m3fn)}, tmp_path / "a")
    found = torch_files.load(tmp_path / "a")
    assert found["c"].dtype == torch.float8_e4m3fn
    assert torch.equal(found["c"].float(), tensor)
    assert found["b"].untyped_storage().data_ptr() == found["a"].untyped_storage().data_ptr()


def test_states_of_numpy_beside_the_tensors_are_passed_over(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "rng": np.random.get_state()}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").keys() == {"a"}


# --- TorchScript ---


class LayerNorm(nn.LayerNorm):
    """In float32, as OpenAI's."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width))
        # No Linear: DeepSpeed may have replaced it in this process by what cannot be traced.
        self.out_proj = nn.Conv1d(width, width, 1)

    def forward(self, x):
        q, k, v = (x @ self.in_proj_weight.t() + self.in_proj_bias).chunk(3, -1)
        x = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out_proj(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.ln_1 = Attention(width), LayerNorm(width)
        layers = OrderedDict(c_fc=nn.Conv1d(width, width, 1), c_proj=nn.Conv1d(width, width, 1))
        self.mlp, self.ln_2 = nn.Sequential(layers), LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x).transpose(1, 2)).transpose(1, 2)


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x):
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.ln_pre, self.transformer = LayerNorm(width), Tower(width)
        self.ln_post, self.proj = LayerNorm(width), nn.Parameter(torch.randn(width, 4))

    def forward(self, image):
        x = self.conv1(image.half()).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.half().expand(1, 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding.half()))
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    """Small, with the names and types of OpenAI's model and the numbers beside its weights."""

    def __init__(self, width=8):
        super().__init__()
        self.visual, self.transformer = Visual(width), Tower(width)
        self.token_embedding = nn.Embedding(20, width)
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 4))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for name, number in {"input_resolution": 32, "context_length": 5, "vocab_size": 20}.items():
            self.register_buffer(name, torch.tensor(number))
        for name, tensor in self.named_parameters():
            whole = ("ln_", "embedding", "logit_scale")
            if not any(words in name for words in whole):
                tensor.data = tensor.data.half()

    def forward(self, image, text):
        x = (self.token_embedding(text) + self.positional_embedding).half()
        x = self.ln_final(self.transformer(x))[:, 0] @ self.text_projection
        return self.logit_scale.exp() * self.visual(image) @ x.t()


class Noted(nn.Module):
    """Has attributes that are neither parameter nor buffer, and a part under two names."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.again, self.note, self.sizes, self.count = self.norm, torch.ones(3), [1, 2], 3

    def forward(self, x):
        return self.again(self.norm(self.conv(x))) + self.note.sum() + self.sizes[0] + self.count


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_give_their_state_dicts_to_the_bit(tmp_path):
    with torch.no_grad():
        inputs = torch.randn(1, 3, 32, 32), torch.arange(5)[None]
        torch.jit.trace(Clip().eval(), inputs, check_trace=False).save(tmp_path / "clip.pt")
    torch.jit.script(Noted()).save(tmp_path / "noted.pt")
    for path, number in ((tmp_path / "clip.pt", 65), (tmp_path / "noted.pt", 12)):
        found = torch_files.load(path)
        same(found, dict(torch.jit.load(path).state_dict()))
        assert len(found) == number
    found = read(tmp_path / "clip.pt")
    assert found["input_resolution"] == 32
    assert found.dtype("visual.transformer.resblocks.1.attn.in_proj_bias") == torch.float16


class Restored(nn.Module):
    """Restores itself by code of the archive, which reads or writes what it likes."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.weight = path, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.training = state[2]
        self.weight = torch.from_file(state[0], True, 4).fill_(1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_of_an_archive_does_not_run(tmp_path):
    trap = tmp_path / "written"
    torch.jit.script(Restored(str(trap))).save(tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"got __torch__.*__setstate__.*trust"):
        read(tmp_path / "a.pt")
    assert not trap.exists()
    torch.jit.load(tmp_path / "a.pt")
    assert trap.exists(), "the archive does nothing that had to be prevented"


# --- bounds ---


def test_the_name_of_a_storage_is_a_text(tmp_path):
    header = (torch_files._MAGIC, 1001, {"little_endian": True}, {})
    keys = b"\x80\x02]" + NESTED + b"a."
    content = b"".join(pickle.dumps(part, 2) for part in header) + keys
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="without a name"):
        read(tmp_path / "a.pth")


def test_a_module_that_is_held_often_is_counted_each_time(tmp_path):
    """A child of 400 tensors under 400 names."""
    module = b"c__torch__\nM\n)\x81%b}("
    tensor = tensor_pickle(0, (4,), (1,)).removeprefix(b"\x80\x02")
    # What is saved is {"a": tensor}; the tensor is what its call, the last one, gave.
    call = tensor[tensor.index(b"ctorch") : tensor.rindex(b"R") + 1]
    data = b"\x80\x02" + call + b"r\xe8\x03\x00\x000" + module % b"r\xe9\x03\x00\x00"
    data += b"".join(text(f"a{i}") + b"j\xe8\x03\x00\x00" for i in range(400)) + b"ub0"
    data += module % b"" + b"".join(text(f"c{i}") + b"j\xe9\x03\x00\x00" for i in range(400))
    names = "".join(f'"a{i}", ' for i in range(400))
    code = f"class M(Module):\n  __parameters__ = [{names}]\n  __buffers__ = []\n"
    more = (("constants.pkl", b"\x80\x02)."), ("code/__torch__.py", code.encode()), *DATA)
    archive(tmp_path / "a.pt", data + b"ub.", more=more)
    with pytest.raises(WeightsError, match="endless"):
        read(tmp_path / "a.pt")


def test_views_of_a_file_of_before_share_their_storage(tmp_path):
    """Wherever the storage begins: behind texts of these lengths, it is not always aligned."""
    flat = torch.arange(60.0)
    for length in range(4):
        saved = {"model": {f"p{i}": flat[i : i + 2] for i in range(58)}, "z": "q" * length}
        torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        found = torch_files.load(tmp_path / "a.pth")["model"]
        same(found, saved["model"])
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
        assert found["p0"].data_ptr() % 4 == 0


def test_members_are_inflated_within_bounds_and_storages_are_not_inflated(tmp_path):
    path = tmp_path / "a.pth"
    archive(path, b"\x80\x02" + b"N0" * (20 << 20), compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="32 MB"):
        read(path)
    archive(path, tensor_pickle(0, (4,), (1,)), compress=zipfile.ZIP_DEFLATED, more=DATA)
    with pytest.raises(WeightsError, match="is compressed"):
        read(path)
    archive(path, tensor_pickle(0, (4,), (1,)), compress=zipfile.ZIP_BZIP2, more=DATA)
    with pytest.raises(WeightsError, match="does not use"):
        read(path)


def test_the_table_of_contents_of_an_archive_is_bounded(tmp_path):
    more = [(f"data/{'n' * 1000}{i}", b"") for i in range(9000)]
    archive(tmp_path / "a.pth", pickle.dumps({}, 2), more=more)
    with pytest.raises(WeightsError, match="8 MB"):
        read(tmp_path / "a.pth")


def test_modules_without_end_are_refused(tmp_path):
    """A module that holds itself, and one whose every level holds the next twice."""
    code = b"class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
    loop = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    one = b"c__torch__\nM\n)\x81}"
    level = b"(X\x01\x00\x00\x00a%bX\x01\x00\x00\x00bh%bu"
    data = one + b"bq\x00"
    for depth in range(1, 60):
        data += (
            one + level % (b"h" + bytes([depth - 1]), bytes([depth - 1])) + b"bq" + bytes([depth])
        )
    for pickled, problem in (
        (loop, "nested too deeply"),
        (b"\x80\x02" + data + b".", "endless"),
    ):
        more = (("constants.pkl", b"\x80\x02)."), ("code/__torch__.py", code))
        archive(tmp_path / "a.pt", pickled, more=more)
        with pytest.raises(WeightsError, match=problem):
            read(tmp_path / "a.pt")


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("archive/data.pkl", tensor_pickle(0, (4,), (1,)))
        file.writestr("archive/byteorder", b"big")
        file.writestr("archive/data/0", b"\x00" * 16)
    with pytest.raises(WeightsError, match="byte order"):
        read(tmp_path / "a.pth")
