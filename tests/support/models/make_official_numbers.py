"""Runs the official fine-tuning and linear probe on the inputs of `official.py`, in float64.

python tests/support/models/make_official_numbers.py CHECKOUT

CHECKOUT is one of SwinTransformer/Feature-Distillation; `yacs` and timm 0.4.12, which it asks for
(later versions scale learning rates of layers once more), must come first on PYTHONPATH. Its own
train_one_epoch and validate run, on a CPU: what calls for a GPU is replaced by what does nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import official
import torch
from official import BATCH, CLASSES, NUM_TEST, STEPS, VIT, WARMUP
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET

PRECISION = torch.float64


class Loader:
    """Batches of one epoch, normalised as in training."""

    def __init__(self, name: str, count: int) -> None:
        self._images, self._labels = official.images(name, count), official.labels(name, count)

    def __len__(self) -> int:
        return len(self._labels) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = (torch.tensor(row, dtype=PRECISION).view(3, 1, 1) for row in IMAGENET)
        for start in range(0, len(self._labels), BATCH):
            images = self._images[start : start + BATCH].to(PRECISION) / 255
            yield (images - mean) / std, self._labels[start : start + BATCH]


def as_on_a_gpu() -> None:
    """Lets code for GPUs and several ranks run in this process on the CPU."""
    # They only write logs.
    for name in ("wandb", "termcolor"):
        sys.modules[name] = SimpleNamespace(colored=str)  # type: ignore[assignment]
    Tensor.cuda = lambda self, **_: self  # type: ignore[method-assign,assignment]
    nn.Module.cuda = lambda self, **_: self  # type: ignore[method-assign,assignment]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.max_memory_allocated = lambda *_: 0
    torch.nn.parallel.DistributedDataParallel = lambda module, **_: module  # type: ignore[misc,assignment]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1
    )


def configuration(settings: dict[str, Any]) -> Any:
    """The official configuration with a tiny model."""
    from config import _C

    config = _C.clone()
    config.MODEL.TYPE, config.MODEL.NUM_CLASSES = "vit", CLASSES
    config.MODEL.DROP_PATH_RATE, config.DATA.IMG_SIZE = 0.0, VIT["img_size"]
    vit = config.MODEL.VIT
    vit.PATCH_SIZE, vit.EMBED_DIM, vit.DEPTH = VIT["patch_size"], VIT["embed_dim"], VIT["depth"]
    vit.NUM_HEADS, vit.INIT_VALUES = VIT["num_heads"], VIT["init_values"]
    # As in configs/finetune: the shared table becomes one for each block.
    vit.USE_RPB, vit.USE_SHARED_RPB, vit.USE_MEAN_POOLING = True, False, True
    train = config.TRAIN
    train.BASE_LR, train.WARMUP_LR = settings["base_lr"], settings["warmup_lr"]
    train.MIN_LR, train.WEIGHT_DECAY = settings["min_lr"], settings["weight_decay"]
    train.LAYER_DECAY = settings.get("layer_decay", 1.0)
    train.CLIP_GRAD = settings.get("clip_norm", 0.0)
    train.EPOCHS, train.WARMUP_EPOCHS, train.WARMUP_EPOCHS_FINE = 1, -1, WARMUP / STEPS
    config.PRINT_FREQ = 10**9
    return config


def encoder() -> dict[str, Any]:
    """Shape of each parameter of the student in pre-training."""
    from models.vision_transformer import VisionTransformer

    model = VisionTransformer(**VIT, num_classes=0, use_mean_pooling=False)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def model_of(config: Any, folder: Path) -> nn.Module:
    from models import build_model
    from utils import load_pretrained

    model = build_model(config, is_pretrain=False)
    for name in ("head.weight", "head.bias"):
        parameter = model.get_parameter(name)
        parameter.data = official.weight(name, tuple(parameter.shape))
    config.PRETRAINED = official.student(folder).init
    logger = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)
    load_pretrained(config, model, logger)
    return model.to(PRECISION)


def listed(values: Tensor) -> list[float]:
    return [round(value, 9) for value in values.flatten().tolist()]


def trained(program: Any, config: Any, model: nn.Module, optimizer: Any, criterion: Any) -> dict:
    """Ten steps by the program's own functions, and its test."""
    import lr_scheduler

    program.logger = SimpleNamespace(info=lambda *_: None)
    losses, rates = [], []

    def recorded(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = criterion(outputs, targets)
        losses.append(loss.item())
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        return loss

    loader = Loader("train", STEPS * BATCH)
    scheduler = lr_scheduler.build_scheduler(config, optimizer, len(loader))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    arguments: list[Any] = [config, model, recorded, loader, optimizer, 0, None, scheduler, scaler]
    program.train_one_epoch(*arguments)
    tests = Loader("test", NUM_TEST)
    top1, top5, test_loss = program.validate(config, tests, model)
    with torch.no_grad():
        logits = torch.cat([model(pixels) for pixels, _ in tests])
    return {
        "losses": losses,
        "rates": rates,
        "top1": top1,
        "top5": top5,
        "test_loss": test_loss,
        "logits": listed(logits),
    }


def finetuning(folder: Path) -> dict[str, Any]:
    """main_finetune.py: without mixing and drop path."""
    import main_finetune
    from optimizer import build_optimizer
    from timm.loss import LabelSmoothingCrossEntropy

    config = configuration(official.FINETUNING)
    model = model_of(config, folder)
    logger: Any = SimpleNamespace(info=lambda *_: None)
    optimizer = build_optimizer(config, model, logger, is_pretrain=False)
    criterion = LabelSmoothingCrossEntropy(official.FINETUNING["smoothing"])
    return trained(main_finetune, config, model, optimizer, criterion)


def linear(folder: Path) -> dict[str, Any]:
    """main_linear.py; lines of its `main` that make the head and the optimiser are repeated."""
    import main_linear

    config = configuration(official.LINEAR)
    model = model_of(config, folder)
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6, dtype=PRECISION)
    model.head = nn.Sequential(norm, model.head)
    model.requires_grad_(False).head.requires_grad_(True)
    pixels, _ = next(iter(Loader("test", NUM_TEST)))
    with torch.no_grad():
        features = model.eval().forward_features(pixels)
    optimizer = main_linear.LARS(
        model.head.parameters(), lr=config.TRAIN.BASE_LR, weight_decay=config.TRAIN.WEIGHT_DECAY
    )
    after: list[Tensor] = []
    step: Callable[[], None] = optimizer.step

    def recorded() -> None:
        step()
        after.append(model.head[1].weight.detach().clone())

    optimizer.step = recorded
    found = trained(main_linear, config, model, optimizer, nn.CrossEntropyLoss())
    return {
        **found,
        "features": listed(features),
        "weight_after_one_step": listed(after[0]),
        "running_mean": listed(norm.running_mean),
        "running_var": listed(norm.running_var),
    }


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    as_on_a_gpu()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "source": "SwinTransformer/Feature-Distillation, by tests' make_official_numbers.py",
            "commit": subprocess.run(
                ["git", "-C", checkout, "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip(),
            "encoder": encoder(),
        }
        write(found)
        found |= {"finetuning": finetuning(Path(folder)), "linear": linear(Path(folder))}
    write(found)


def write(found: dict[str, Any]) -> None:
    official.NUMBERS.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
