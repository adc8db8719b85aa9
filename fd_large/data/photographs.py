"""Photographs that come with two Python packages, for a first run without any download.

The packages are scikit-image and scikit-learn. (The images china and flower of scikit-learn are CC
BY 2.0, by danielbuechele and vultilion on Flickr.) Drawings, test patterns and images smaller than
a view are left out.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from fd_large.data.decode import decode
from fd_large.data.roots import BUILTIN, require_builtin
from fd_large.errors import DataError

# Held out: two everyday scenes in colour, one near and one far, of kinds that an ImageNet teacher
# knows and of which training has no other image (no other animal, no other building). They were
# chosen by that rule before any result was seen. A second image of a held-out scene in training
# would give the answer away, and images of cells, stars or textures would measure little.
HELD_OUT = ("skimage/chelsea.png", "sklearn/china.jpg")

TRAINING = (
    "skimage/astronaut.png",
    "skimage/coffee.png",
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/motorcycle_left.png",
    "skimage/motorcycle_right.png",
    "skimage/retina.jpg",
    "skimage/rocket.jpg",
    "sklearn/flower.jpg",
    # The next ones are grey.
    "skimage/brick.png",
    "skimage/camera.png",
    "skimage/cell.png",
    "skimage/coins.png",
    "skimage/grass.png",
    "skimage/gravel.png",
    "skimage/moon.png",
    "skimage/page.png",
    "skimage/text.png",
)

# Number of times that each image is listed, since an epoch of a handful of samples would end after
# one step.
REPEATS = 256

_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


SETS = {"builtin:photographs": False, "builtin:photographs-held-out": True}


def open_photographs(root: str, *, where: str) -> Photographs | None:
    """Opens `builtin:photographs` or `builtin:photographs-held-out`.

    The result is None if `root` does not start with "builtin:".

    Raises: DataError: if there is no built-in dataset of this name, or a package is missing.
    """
    if not root.startswith(BUILTIN):
        return None
    require_builtin(root, where)
    return Photographs(SETS[root], where=where)


class Photographs:
    """`ImageSource` of the training photographs or the held-out photographs.

    The whole set is listed `REPEATS` times, one time after another. The photographs are decoded
    once and kept in memory as uncompressed PPM files, 20 MB in all. Decoding a PNG again for every
    crop would cost as much as a fifth of a training step on a CPU.

    Attributes:
        names: Names of the photographs, without repeats.
        fingerprint: A hash of the names.
    """

    fingerprint: str

    def __init__(self, held_out: bool, *, where: str = "data.root") -> None:
        """Reads and decodes the two held-out photographs, or all others.

        Raises: DataError: if a package is not installed, or one of its files cannot be read.
        """
        self.names = HELD_OUT if held_out else TRAINING
        self._files = [_read(name, where) for name in self.names]
        self.fingerprint = hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names) * REPEATS

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.names[index % len(self.names)]

    def read(self, index: int) -> bytes:
        """Returns the bytes of image `index`, a PPM file."""
        return self._files[index % len(self.names)]


def _read(name: str, where: str) -> bytes:
    package, _, file = name.partition("/")
    # Found, not imported: importing scikit-learn takes a second, and only files are wanted.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"{where}: builtin:photographs needs the package {_DISTRIBUTIONS[package]}; got "
            "nothing, expected it to be installed. Install it: pip install "
            f"{_DISTRIBUTIONS[package]}, or set --{where} to a folder of images."
        )
    path = Path(spec.origin).parent / _FOLDERS[package] / file
    try:
        return _as_ppm(path.read_bytes(), name)
    except OSError as error:
        raise DataError(
            f"{where}: a photograph cannot be read; got {error.strerror} for {path}, expected "
            f"the file of {_DISTRIBUTIONS[package]}. Install that package again."
        ) from error


def _without_profile(encoded: bytes) -> bytes:
    """Removes the colour profile of a PNG from its bytes; other files are returned unchanged.

    libpng would warn about the profile on every rank. `decode` ignores colour profiles, so that the
    pixels are the same.
    """
    if not encoded.startswith(b"\x89PNG"):
        return encoded
    kind = encoded.find(b"iCCP", 0, encoded.find(b"IDAT"))
    if kind < 0:
        return encoded
    # A chunk has its length, kind, contents and checksum; all but the contents have four bytes.
    length = int.from_bytes(encoded[kind - 4 : kind], "big")
    return encoded[: kind - 4] + encoded[kind + 4 + length + 4 :]


def _as_ppm(encoded: bytes, name: str) -> bytes:
    pixels = decode(_without_profile(encoded), name).permute(1, 2, 0).contiguous()  # (H, W, 3)
    height, width, _ = pixels.shape
    return f"P6 {width} {height} 255\n".encode() + pixels.numpy().tobytes()
