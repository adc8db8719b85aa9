"""A model as the engine makes it from a source: settled, built, filled."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from safetensors.torch import save_file

from fd_large.backbones.registry import build
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.frozen import frozen_weights
from fd_large.engine.student import student_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.distillation.section import Objective, Teacher
from fd_large.tasks.jobs import job_of
from fd_large.weights.resolve import Sources

# No test may ask a server.
os.environ["HF_HUB_OFFLINE"] = "1"


def settled(run):
    """The recipe with what its weights decide; the folder of a run is a source too."""
    return job_of(run).settle(sources_of(job_of))


def teacher_run(source, model="auto", *, allow=(), statistics=(), **fields):
    """A settled run with that teacher."""
    run = registry.get("fd_clip_vit_base")
    teacher = Teacher(
        model=model,
        source=str(source),
        allow=allow,
        statistics=statistics,
        architecture=Architecture(**fields),
    )
    # The teacher keeps the image size of its weights.
    return settled(replace(run, teacher=teacher, objective=Objective()))


def opened(source, where="weights"):
    """The weights of a source in a published format."""
    return Sources().resolve(source, where=where).published


def loaded(source, model="auto", *, allow=(), statistics=(), **fields):
    """The teacher's model with the weights of a source, frozen, and its settled section."""
    run = teacher_run(source, model, allow=allow, statistics=statistics, **fields)
    net = build(run.teacher.model, run.teacher.architecture, initialization="none")
    load_weights(
        net,
        frozen_weights(run.teacher, sources_of(job_of), where="--teacher.source"),
        where="--teacher.source",
    )
    return net.requires_grad_(False).eval(), run.teacher


def student_run(init, model, size=224, *, allow=(), **fields):
    """A settled run whose student starts from a file."""
    run = registry.get("fd_clip_vit_base")
    student = replace(
        run.student,
        model=model,
        init=str(init),
        init_allow=allow,
        architecture=Architecture(**fields),
    )
    return settled(replace(run, student=student, data=replace(run.data, image_size=size)))


def initial(init, model, size=224, *, allow=(), **fields):
    """A student's model filled from a file."""
    run = student_run(init, model, size, allow=allow, **fields)
    architecture = run.student_architecture().at(size)
    net = build(architecture, initialization="official", seed=0)
    load_weights(
        net,
        student_weights(run.student, sources_of(job_of), image_size=run.data.image_size),
        where="--student.init",
    )
    return net.eval(), run.student


def scattered(net, seed=0):
    """A model whose every parameter is random: fresh ones hide mistakes behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            scale = 0.3 if "bias_table" in name or "cpb_mlp" in name else 0.1
            parameter.copy_(1 + 0.1 * noise if is_norm else scale * noise)
            if "logit_scale" in name:
                parameter.copy_(2.3 + 0.5 * noise)
    return net.eval()


def close(a, b, tolerance=1e-5):
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error < tolerance, error


TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 3),
    "num_heads": (2, 4),
    "window_size": 4,
}
"""Tiny models of timm."""
HF_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
"""A tiny ViT of transformers."""
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def saved(net, path):
    """Writes a state as its suffix says."""
    (save_file if path.suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    return path


def tokens(net, images=IMAGES):
    """The last tokens of a model of timm, (B, N, C)."""
    with torch.no_grad():
        found = net.forward_features(images)
    return found.flatten(1, 2) if found.dim() == 4 else found


TINY_VIT = Architecture(embed_dim=32, depths=(2,), num_heads=(2,), patch_size=8, image_size=32)


TINY_SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, patch_size=2, image_size=32
)


TINY = {
    "vit_base_patch16": TINY_VIT,
    "dino_vit_base_patch16": TINY_VIT,
    "clip_vit_base_patch16": TINY_VIT,
    "swinv2_huge": replace(TINY_SWIN, extra_norm_every=2),
    "swin_base_esvit": TINY_SWIN,
}


def made(name):
    """The tiny model of that name, random."""
    return scattered(build(name, TINY[name], initialization="official", seed=0))
