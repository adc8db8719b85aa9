"""Numbers of training images of the datasets that published recipes use."""

from __future__ import annotations

IMAGENET = 1_281_167
ADE20K = 20_210
COCO = 118_287
NYUV2 = 24_231
