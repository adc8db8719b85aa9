"""Parameter counts: to the unit, against the published and counted figures."""

import pytest

from fd_large.errors import ConfigError
from fd_large.plan.parameters import count, projection_shapes, shapes, sizes, width
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve

# Name: without extra norms, with one every 6 blocks, with one position-bias MLP a stage.
SWINV2 = {
    "swinv2_tiny": (27_578_154, 27_578_922, 27_518_250),
    "swinv2_small": (48_959_418, 48_961_722, 48_807_354),
    "swinv2_base": (86_893_816, 86_896_888, 86_701_304),
    "swinv2_large": (195_202_932, 195_207_540, 194_929_524),
    "swinv2_huge": (655_210_922, 655_219_370, 654_735_274),
    "swinv2_1b": (1_060_976_996, 1_060_987_748, 1_060_380_004),
    "swinv2_giant": (2_997_815_008, 2_997_843_680, 2_996_179_680),
}


@pytest.mark.parametrize(("name", "expected"), SWINV2.items())
def test_swinv2_counts(name, expected):
    counts = tuple(
        count(shapes(resolve(name, Architecture(extra_norm_every=every, shared_position_bias=one))))
        for every, one in ((0, False), (6, False), (0, True))
    )
    assert counts == expected


@pytest.mark.parametrize("name", SWINV2)
def test_swinv2_counts_follow_the_closed_formula(name):
    net = resolve(name, Architecture(extra_norm_every=0))
    total = 51 * net.embed_dim + 16 * net.embed_dim
    for stage, (depth, heads) in enumerate(zip(net.depths, net.num_heads, strict=True)):
        c = net.embed_dim * 2**stage
        total += depth * (12 * c**2 + 12 * c + 1536 + 513 * heads)
        total += (8 * c**2 + 4 * c) if stage < 3 else 0
    assert count(shapes(net)) == total


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16", 85_665_360),
        ("vit_large_patch14", 302_955_584),
        ("swin_base_esvit", 86_917_944),
    ],
)
def test_counts_of_the_other_families(name, expected):
    assert count(shapes(resolve(name))) == expected


def test_huge_and_giant_have_their_extra_norms_by_themselves():
    for name in ("swinv2_huge", "swinv2_giant"):
        assert count(shapes(resolve(name))) == SWINV2[name][1]


@pytest.mark.parametrize(("channels", "expected"), [(768, 590_592), (1024, 1_049_600)])
def test_projection_counts(channels, expected):
    assert count(projection_shapes(channels, channels)) == expected
    assert count(projection_shapes(4096, 4096)) == 16_781_312


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [  # Both optimizer groups of the official code together, with the projection.
        ("vit_base_patch16", 51 + 137, 86_123_088 + 132_864),
        ("swinv2_base", 101 + 324, 87_562_240 + 381_176),
        ("swinv2_giant", 205 + 676, 3_011_534_848 + 3_090_144),
    ],
)
def test_tensors_are_as_many_as_the_optimizer_groups_hold(name, tensors, elements):
    net = resolve(name)
    table = sizes([shapes(net), projection_shapes(width(net), width(net))])
    assert (len(table), sum(table)) == (tensors, elements)


def test_position_tables_follow_the_image_size():
    net = resolve("vit_base_patch16")
    table = shapes(net, image_size=64)["rel_pos_bias.relative_position_bias_table"]
    assert table == ((2 * 4 - 1) ** 2 + 3, 12)
    swin = shapes(resolve("swin_base_esvit"))
    rows = [
        swin[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"][0] for stage in range(4)
    ]
    assert rows == [729, 729, 729, 169]


@pytest.mark.parametrize(
    ("name", "side", "tokens"),
    [("clip_vit_large_patch14", 224, 257), ("deit_distilled_vit_base_patch16", 224, 198)],
)
def test_absolute_positions_count_prefix_tokens(name, side, tokens):
    assert shapes(resolve(name), image_size=side)["pos_embed"][1] == tokens


def test_the_tensors_of_a_net_of_timm_are_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"plan: .*got tf_efficientnet_lite0.*built model"):
        shapes(resolve("efficientnet_lite0"))
    assert width(resolve("efficientnet_lite0")) == 40
    with pytest.raises(ConfigError, match=r"plan: .*where it is built; got convnext_tiny"):
        width(resolve("timm", Architecture(timm_name="convnext_tiny")))


@pytest.mark.parametrize("name", [n for n, net in ARCHITECTURES.items() if net.can_train])
def test_a_built_net_has_these_tensors(name):
    torch = pytest.importorskip("torch")
    from fd_large.backbones import registry

    with torch.device("meta"):
        net = registry.build(name)
    built = {key: tuple(value.shape) for key, value in net.named_parameters()}
    assert built == shapes(resolve(name))
