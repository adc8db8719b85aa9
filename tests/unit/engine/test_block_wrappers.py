import pytest
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.block_wrappers import checkpoint_blocks, compile_blocks
from fd_large.errors import ConfigError


def _net():
    torch.manual_seed(0)
    return SwinV2(16, (2, 2), (1, 2), window_size=4, drop_path_rate=0.2)


def _run(mode, every=1, images=2):
    """Gradients, bytes that autograd saves, and blocks wrapped."""
    net = _net()
    wrapped = checkpoint_blocks(net.blocks(), mode=mode, every=every)
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(8, images, generator=torch.Generator().manual_seed(2)) > 0.2
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(pixels, mask).tokens.square().mean()
    loss.backward()
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    held = sum(size for address, size in saved.items() if address not in parameters)
    return {n: p.grad for n, p in net.named_parameters()}, held, wrapped


@pytest.mark.parametrize(
    ("mode", "every", "blocks"), [("every", 1, 4), ("every", 2, 2), ("offload", 1, 4)]
)
def test_gradients_stay_and_memory_shrinks(mode, every, blocks):
    expected, whole, none = _run("off")
    gradients, held, wrapped = _run(mode, every)
    # An image's share: position tables are made once a step, outside of the blocks, and kept.
    whole = _run("off", images=3)[1] - whole
    held = _run(mode, every, images=3)[1] - held
    assert (none, wrapped) == (0, blocks)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    assert held < (0.3 if every == 1 else 0.75) * whole


def test_compiled_blocks_are_whole_graphs_that_blocks_share_and_give_the_same_gradients():
    from torch._dynamo.utils import counters

    def gradients(compiled):
        torch.manual_seed(0)
        net = SwinV2(16, (3,), (1,), window_size=2, extra_norm_every=2)
        if compiled:
            compile_blocks(net.blocks())
        checkpoint_blocks(net.blocks(), mode="every")
        for _ in range(2):
            images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
            net(images).tokens.square().mean().backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    expected = gradients(compiled=False)
    # Graphs are guarded by the tensors that einops has met, and tracing shows it another kind.
    with FakeTensorMode():
        rearrange(torch.empty(1), "n -> n")
    torch._dynamo.reset()
    counters.clear()
    found = gradients(compiled=True)
    # The first block and the third share one; the second shifts its windows.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_names_stay():
    net = _net()
    before = [name for name, _ in net.named_parameters()]
    checkpoint_blocks(net.blocks(), mode="every")
    assert [name for name, _ in net.named_parameters()] == before


def test_unknown_mode_and_missing_fairscale(monkeypatch):
    with pytest.raises(ConfigError, match="sometimes"):
        checkpoint_blocks(_net().blocks(), mode="sometimes")
    monkeypatch.setitem(__import__("sys").modules, "fairscale.nn.checkpoint", None)
    with pytest.raises(ConfigError, match=r"fd_large\[offload\]"):
        checkpoint_blocks(_net().blocks(), mode="offload")
