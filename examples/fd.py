"""Feature distillation (arXiv 2205.14141) in one file of plain torch, on one process.

    python examples/fd.py --images FOLDER --teacher vit_base_patch16_clip_224.openai --image 224

A frozen teacher turns an image into a map of tokens, and a new student learns that map:

    loss = smooth_l1(projection(student(image)), whiten(teacher(image)))

Whitening normalises each token to mean 0 and variance 1. Only the student has drop path. A test
compares losses and weights of the package with this file: they are equal to the bit in float32, or
within 3e-7 of the loss if gradients are clipped. This student has absolute positions, while the
blocks of the paper's student share a relative position bias.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BETA, EPS = 2.0, 1e-5  # Of smooth L1, and of whitening; as in the official code.


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (images / 255 - mean) / std of uint8 RGB images (B, 3, H, W), as float32."""
    means, stds = (torch.tensor(row, device=images.device).view(1, 3, 1, 1) for row in (mean, std))
    return (images.float() / 255 - means) / stds


class Block(nn.Module):
    """Pre-norm transformer block, with attention over tokens (B, N, C) and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """Returns (B, N, C); `keep` (2, B) scales attention and MLP of each image, None: by 1."""
        scales = (1.0, 1.0) if keep is None else keep[:, :, None, None]
        tokens = tokens + scales[0] * self.attention(self.norm1(tokens))
        return tokens + scales[1] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))

    def attention(self, tokens: Tensor) -> Tensor:
        """Returns softmax(q k^T / sqrt(d)) v of all heads of width d, projected to (B, N, C)."""
        batch, number, width = tokens.shape
        qkv = self.attn["qkv"](tokens).view(batch, number, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        mixed = (q * (width // self.heads) ** -0.5 @ k.mT).softmax(-1) @ v
        return self.attn["proj"](mixed.transpose(1, 2).reshape(batch, number, width))


class ViT(nn.Module):
    """Plain ViT, from normalised images (B, 3, H, W) to tokens (B, 1 + N, C), class token first."""

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, image: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, width) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Two branches a block; the rate rises from 0 in the first to `drop_path` in the last.
        self.rates = [drop_path * i / max(depth - 1, 1) for i in range(depth) for _ in range(2)]

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the tokens after the final norm; `keep` is from `draw_keep`, or None."""
        # Channels last: the convolution's result then is the tokens, without a copy.
        patches = self.patch_embed["proj"](pixels.to(memory_format=torch.channels_last))
        tokens = patches.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = tokens + self.pos_embed
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, None if keep is None else keep[2 * i : 2 * i + 2])
        return self.norm(tokens)

    def draw_keep(self, batch: int) -> Tensor:
        """Draws drop path factors (2 * depth, B): 0 drops a branch, 1 / (1 - rate) keeps it."""
        rates = torch.tensor(self.rates)[:, None]
        return (torch.rand(len(self.rates), batch) >= rates).float() / (1 - rates)


class Teacher(nn.Module):
    """Frozen model of timm, from uint8 images to the tokens (B, N, C) of its last feature map."""

    def __init__(self, name: str, image: int, *, pretrained: bool) -> None:
        super().__init__()
        sized = {"img_size": image} if "vit" in name or "swin" in name else {}
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
        self.mean, self.std = (self.model.default_cfg[key] for key in ("mean", "std"))
        self.width = self.model.num_features
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns all patch tokens, after the class token if the model has one: (B, N, C)."""
        features = self.model.forward_features(normalise(images, self.mean, self.std))
        if features.ndim == 4:  # (B, H, W, C) of Swin, (B, C, H, W) of a CNN.
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return (features if is_last else features.movedim(1, -1)).flatten(1, 2)
        prefix = getattr(self.model, "num_prefix_tokens", 0)  # Class token, then registers.
        return torch.cat([features[:, : min(prefix, 1)], features[:, prefix:]], 1)


class Distilled(nn.Module):
    """The student with a linear projection to the teacher's width, which are trained together."""

    def __init__(self, student: ViT, teacher_width: int) -> None:
        super().__init__()
        self.student = student
        self.projection = nn.Linear(student.width, teacher_width)

    def forward(self, images: Tensor, teacher_tokens: Tensor, keep: Tensor | None) -> Tensor:
        """Returns the mean loss of uint8 images (B, 3, H, W), against teacher tokens (B, N, Ct)."""
        tokens = self.projection(self.student(normalise(images, MEAN, STD), keep))
        if tokens.shape[1] == teacher_tokens.shape[1] + 1:
            tokens = tokens[:, 1:]  # The teacher has no class token: the student's learns nothing.
        whitened = F.layer_norm(teacher_tokens.float(), teacher_tokens.shape[-1:], eps=EPS)
        return F.smooth_l1_loss(tokens.float(), whitened, beta=BETA)


def learning_rate(
    step: int, *, peak: float, start: float, least: float, warmup: int, steps: int
) -> float:
    """Returns the rate of a step: linear warm-up, then cosine; that of step 1 is that of step 0."""
    t = max(step - 1, 0)
    if t < warmup:
        return start + t * (peak - start) / warmup
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))


def make_optimiser(
    model: nn.Module, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Returns an AdamW; weight decay leaves out vectors, position embeddings and class token."""
    by_decay: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        by_decay[weight_decay if is_matrix else 0.0].append(parameter)
    groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
    return torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=True)


def train_step(
    model: Distilled,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    teacher_tokens: Tensor,
    *,
    keep: Tensor | None,
    rate: float,
    clip_norm: float,
) -> float:
    """Runs one step of the optimiser with learning rate `rate`; returns the loss before it."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = model(images, teacher_tokens, keep)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimiser.step()
    return loss.item()


def views(paths: list[Path], batch: int, side: int) -> Iterator[Tensor]:
    """Yields batches without end: random crops, flipped at random, (batch, 3, side, side) uint8."""
    crop = v2.Compose([v2.RandomResizedCrop(side, (0.4, 1.0)), v2.RandomHorizontalFlip()])
    while True:
        images = [Image.open(path).convert("RGB") for path in random.choices(paths, k=batch)]
        yield torch.stack([crop(v2.functional.pil_to_tensor(image)) for image in images])


def images_of(folder: str) -> list[Path]:
    """Returns the image files below `folder`, sorted by path; ends the program if it has none."""
    ends = (".jpg", ".jpeg", ".png")
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ends]
    if not paths:
        raise SystemExit(f"--images: no image; got {folder}, expected files {', '.join(ends)}.")
    return paths


def photographs() -> list[Path]:
    """Returns the paths of the two photographs in scikit-learn's package."""
    import sklearn.datasets

    return sorted(Path(sklearn.datasets.__path__[0], "images").glob("*.jpg"))


def main() -> None:
    """Reads the flags, trains, and saves the student's weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", help="a folder of images; without it two photographs")
    parser.add_argument("--teacher", default="vit_tiny_patch16_224", help="a model of timm")
    parser.add_argument("--random-teacher", action="store_true", help="download no weights")
    parser.add_argument("--out", default="student.pt", help="the student's weights")
    numbers = {"steps": 200, "batch": 16, "image": 64, "patch": 16, "width": 192, "depth": 4}
    for name, value in {**numbers, "heads": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = images_of(flags.images) if flags.images else photographs()
    teacher = Teacher(flags.teacher, flags.image, pretrained=not flags.random_teacher).to(device)
    student = ViT(flags.width, flags.depth, flags.heads, flags.patch, flags.image, drop_path=0.1)
    blank = torch.zeros(1, 3, flags.image, flags.image, dtype=torch.uint8, device=device)
    places, number = student.pos_embed.shape[1] - 1, teacher(blank).shape[1]
    if number not in (places, places + 1):
        raise SystemExit(
            f"--patch: the student's map is not the teacher's; got {places} places of "
            f"{flags.patch} pixels, expected the teacher's {number}. Set --patch to the teacher's "
            "stride, or --image to a size at which the two meet."
        )
    model = Distilled(student, teacher.width).to(device).train()
    optimiser = make_optimiser(model, 0.05, (0.9, 0.999))
    shape = {"peak": flags.lr, "start": 5e-7, "least": 5e-6, "warmup": flags.steps // 10}
    batches = views(paths, flags.batch, flags.image)
    for step in range(flags.steps):
        images = next(batches).to(device)
        rate = learning_rate(step, steps=flags.steps, **shape)
        keep = student.draw_keep(len(images)).to(device)
        loss = train_step(
            model, optimiser, images, teacher(images), keep=keep, rate=rate, clip_norm=3.0
        )
        if step % 10 == 0 or step == flags.steps - 1:
            print(f"step {step}: loss {loss:.4f}, learning rate {rate:.2e}")
    torch.save(student.state_dict(), flags.out)


if __name__ == "__main__":
    main()
