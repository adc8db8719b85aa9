"""A global batch that divides on all ranks passes; another is refused with those that would."""

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes.batch_sizes import check_division, nearest_divisors


def check(sizes):
    keys = ("global_batch_size", "micro_batch_size", "world_size")
    check_division(**dict(zip(keys, sizes, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (100, 16, 2),
            r"batch\.global_batch_size: .*got global_batch_size 100 with micro_batch_size 16 on 2 "
            r"ranks, expected a multiple of 32 .*Set --batch\.global_batch_size to 96 or 128, "
            r"or --batch\.micro_batch_size to 10 or 25\.",
        ),
        (
            (100, 4, 3),
            r"multiple of 12 \(3 x 4\)\. Set --batch\.global_batch_size to 96 or 108, "
            r"or start 1 or 5 ranks\.$",
        ),
        ((8, 16, 1), r"size to 16, or --batch\.micro_batch_size to 8\.$"),
        ((0, 8, 2), r"batch\.global_batch_size: .*got 0"),
        ((8, -1, 2), r"batch\.micro_batch_size: .*got -1"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check(sizes)


@pytest.mark.parametrize("sizes", [(2048, 32, 64), (16384, 32, 512), (1, 1, 1)])
def test_one_that_divides_passes(sizes):
    check(sizes)


def test_the_nearest_divisors():
    assert nearest_divisors(100, 16) == [10, 20]
    assert nearest_divisors(100, 20) == [20]
    assert nearest_divisors(6, 9) == [6]
