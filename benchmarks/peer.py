"""Runs the official Feature-Distillation code as a contender, from a checkout of the user's.

The checkout is made by `git clone https://github.com/SwinTransformer/Feature-Distillation PATH`,
and needs timm, torchvision and tqdm. The official code is not copied here, and no weights are
loaded. The contender has the official SwinV2 student, Swin teacher (EsViT's class with random
weights), loss and optimiser, in the order of the official training loop: DDP, autocast, backward,
clipping, step, and reading the loss on the host. The official code was written for float16
autocast. For bfloat16, the contender runs with bfloat16 autocast, and with float32 parameters and
gradients, which DDP communicates in float32.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from contenders import RATE, Setting, Step, Unavailable
from torch import Tensor

from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.data.loader import Batch
from fd_large.ranks import distributed
from fd_large.recipes.architectures import resolve

NEEDED = ("models/feature_distillation.py", "models/esvit.py", "optimizer.py")


def build_peer(setting: Setting) -> Step:
    """Returns the step of the official code, with models of the setting's sizes.

    Raises:
        Unavailable: If `setting.peer_repo` is no checkout of Feature-Distillation, a package that
            the official code imports is missing, or the code cannot build the student.
    """
    assert setting.peer_repo is not None
    for name in NEEDED:
        if not (setting.peer_repo / name).is_file():
            raise Unavailable(f"--peer-repo: no {name} in {setting.peer_repo}")
    if setting.run.student_architecture().extra_norm_every:
        raise Unavailable("its build function has no switch for the student's extra norms")
    sys.path.insert(0, str(setting.peer_repo.resolve()))
    try:
        distillation = importlib.import_module("models.feature_distillation")
        esvit = importlib.import_module("models.esvit")
        optimizers = importlib.import_module("optimizer")
    except ImportError as error:
        raise Unavailable(f"--peer-repo: {error}") from None
    finally:
        sys.path.pop(0)
    return _step(setting, distillation, esvit, optimizers)


def _step(
    setting: Setting, distillation: ModuleType, esvit: ModuleType, optimizers: ModuleType
) -> Step:
    run, device = setting.run, distributed.device()
    config = _config(setting)

    def random_teacher(name: str, **_: Any) -> Any:
        """Returns a teacher with random weights, in place of the function that loads weights."""
        shape = resolve(run.teacher.model, run.teacher.architecture)
        return esvit.WarpperSwinTransformer(
            img_size=run.data.image_size,  # Its default is 224.
            patch_size=4,
            embed_dim=shape.embed_dim,
            depths=list(shape.depths),
            num_heads=list(shape.num_heads),
            window_size=shape.window_size,
            num_classes=0,
        )

    distillation.load_esvit = random_teacher
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.runtime.seed)
        model = distillation.build_fd(config).to(device).train()
    optimizer = optimizers.build_optimizer(config, model, logging.getLogger("peer"), True)
    module = model
    if distributed.world_size() > 1:
        device_ids = [distributed.local_rank()] if device.type == "cuda" else None
        module = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=device_ids, broadcast_buffers=False
        )

    def step(batch: Batch) -> Tensor:
        images = normalise(batch.images.to(device, non_blocking=True), IMAGENET)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bfloat16):
            loss = module(images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        loss.item()
        return loss.detach()

    return step


def _config(setting: Setting) -> SimpleNamespace:
    """Returns the settings of `setting` in the form of the official code's configuration.

    It has only the entries that the official functions which build model and optimiser read.
    """
    run, shape = setting.run, setting.run.student_architecture()
    space = SimpleNamespace
    swin = space(
        PATCH_SIZE=4,
        IN_CHANS=3,
        EMBED_DIM=shape.embed_dim,
        DEPTHS=list(shape.depths),
        NUM_HEADS=list(shape.num_heads),
        WINDOW_SIZE=shape.window_size,
        MLP_RATIO=4.0,
        QKV_BIAS=True,
        QK_SCALE=None,
        APE=False,
        PATCH_NORM=True,
        USE_SHARED_RPB=False,
    )
    optim = space(NAME="adamw", EPS=run.optim.eps, BETAS=run.optim.betas)
    return space(
        DATA=space(IMG_SIZE=run.data.image_size),
        MODEL=space(
            TYPE="swin_v2", DROP_RATE=0.0, DROP_PATH_RATE=run.student.drop_path_rate, SWIN=swin
        ),
        DEV=space(PRED_FEAT="ESVIT", PRED_FEAT_AFTERNORM=True, PRED_FEAT_S3=False),
        TRAIN=space(
            USE_CHECKPOINT=False,
            OPTIMIZER=optim,
            BASE_LR=RATE,
            WEIGHT_DECAY=run.optim.weight_decay,
        ),
    )
