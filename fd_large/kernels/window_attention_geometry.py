"""Where the tokens of windowed attention are, and in which tiles the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Partials(NamedTuple):
    """Shapes of the float32 partial sums of backward."""

    table: tuple[int, ...]
    bias: tuple[int, ...]
    scale: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where the tokens are, and in which tiles the kernels take them.

    Attributes:
        num_heads: h.
        head_width: C / h.
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window.
        shift: Offset of the windows in both directions, in tokens.
        cosine: Whether q and k are normalised.
        prefix: Number of tokens before those of the map; with any, the window is the map.
    """

    num_heads: int
    head_width: int
    height: int
    width: int
    window: tuple[int, int]
    shift: int
    cosine: bool
    prefix: int

    @classmethod
    def of(
        cls,
        qkv: Tensor,
        num_heads: int,
        height: int,
        width: int,
        window_height: int,
        window_width: int,
        shift: int,
        cosine: bool,
    ) -> Geometry:
        """Returns the geometry of the operation's arguments."""
        return cls(
            num_heads,
            qkv.shape[2] // (3 * num_heads),
            height,
            width,
            (window_height, window_width),
            shift,
            bool(cosine),
            qkv.shape[1] - height * width,
        )

    @property
    def windows(self) -> int:
        """Number of windows in an image."""
        return _ceil(self.height, self.window[0]) * _ceil(self.width, self.window[1])

    @property
    def tokens(self) -> int:
        """N, the tokens of a window."""
        return self.prefix + self.window[0] * self.window[1]

    @property
    def padded_width(self) -> int:
        """Head width, padded for tiles."""
        return max(16, _power_of_2(self.head_width))

    @property
    def tile(self) -> int:
        """Tokens of a program; fewer if wide heads would spill registers."""
        few = self.padded_width > 64 or (self.padded_width == 64 and self.cosine)
        return min(32 if few else 64, max(16, _power_of_2(self.tokens)))

    @property
    def tiles(self) -> int:
        """Programs per window and head."""
        return _ceil(self.tokens, self.tile)

    @property
    def step(self) -> int:
        """Keys that the forward takes at once; the backward takes 16, as registers allow."""
        return 32 if self.tokens > 16 and self.padded_width <= 64 else 16

    @property
    def rest(self) -> int:
        """Keys after the forward's whole steps, for a step of 16; 0: the last step is padded."""
        rest = self.tokens % self.step
        return rest if rest <= 16 < self.step else 0

    @property
    def row(self) -> int:
        """Slots for a row of a window in a tile of the table's gradient."""
        return _power_of_2(self.window[1])

    @property
    def slots(self) -> int:
        """Side of such a tile."""
        return max(32 if self.padded_width <= 64 else 16, self.row)

    @property
    def kinds(self) -> int:
        """Number of diagonals of such tiles; a prefix adds three."""
        return 2 * _ceil(self.window[0], self.slots // self.row) - 1 + 3 * self.prefix

    def chunks(self, batch: int) -> int:
        """Returns over how many programs a head's windows are spread, per tile of queries or keys.

        Like `groups`, it depends on shapes only, so that sums have the same order on every device.
        Fewer partial sums mean less traffic; enough programs for a large GPU remain.
        """
        windows = batch * self.windows
        return _ceil(windows, max(1, min(4, windows * self.num_heads * self.tiles // 2048)))

    def groups(self, batch: int) -> int:
        """Returns over how many programs windows are spread, per diagonal of the gradient."""
        return min(batch * self.windows, _ceil(512, self.num_heads * self.kinds))

    def partials(self, batch: int) -> Partials:
        """Returns the shapes of what the backward sums in two stages."""
        block = (2 * (self.slots // self.row) - 1, self.window[1], self.window[1])
        programs = self.chunks(batch) * self.tiles
        return Partials(
            (self.groups(batch), self.num_heads, self.kinds, *block),
            (programs, 2, self.num_heads * self.head_width),
            (self.num_heads, programs),
        )


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
