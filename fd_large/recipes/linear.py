"""The linear probe of Feature-Distillation, with the settings of MAE's.

Source: main_linear.py of SwinTransformer/Feature-Distillation for the method. The configuration of
the probe is not published, so that the paper's results (80.1 for CLIP's student) cannot be
reproduced. The settings are those of He et al. (MAE), arXiv 2111.06377, appendix A.1, whose probe
the code follows.
"""

from __future__ import annotations

from fd_large.recipes.run import UNNAMED, Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student


def linear_probe() -> Run:
    """Train a linear layer on the frozen features of any model.

    Hardware: 16 GPUs x 1024 images; ImageNet-1K in train/ and val/
    Duration: 7,020 steps; 6.3 to 9.9 GPU-hours for a ViT-B/16
    Result: no figure known: its settings are not the paper's

    Work: 35.1 GFLOP x 1.15e8 images = 4.0e18 FLOP, at an assumed 200 TFLOP/s per GPU. MAE's
    learning rate is 0.1 per 256 images, which is 0.2 per 512 images. Name the weights by
    --student.init RUN_OR_FILE.
    """
    return Run(
        name=UNNAMED,
        student=Student(model="vit_base_patch16", drop_path_rate=0.0),
        data=Data(image_size=224, min_crop_scale=0.08),
        task=Task(name="linear"),
        optim=Optim(
            name="lars",
            base_lr=0.2,
            warmup_lr=0.0,
            min_lr=0.0,
            weight_decay=0.0,
            epochs=90,
            warmup_epochs=10,
            clip_norm=0.0,
        ),
        batch=Batch(global_batch_size=16384),
    )
