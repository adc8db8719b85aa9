"""Starts DeepSpeed, and clears its global state between engines.

On a CPU, DeepSpeed is started in such a way that it needs no C++ compiler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from types import ModuleType

import torch

from fd_large.engine.zero import private_names
from fd_large.engine.zero.gloo import gather_in_place, scatter_in_place, sum_on_owner
from fd_large.engine.zero.step_gate import ask_once
from fd_large.imports import without
from fd_large.ranks import distributed
from fd_large.ranks.launch import check_accelerator

check_accelerator()
if not torch.cuda.is_available():
    # Read at import: names the accelerator and keeps DeepSpeed from guessing with a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Torch's collectives warn at each call about names that DeepSpeed still uses.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed.*")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


# Its autotuner asks for MLflow, whose import takes as long as all else of DeepSpeed.
with without("mlflow"):
    import deepspeed

_LINEAR = torch.nn.functional.linear
_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


class _NoMuon(ModuleType):
    """A stand-in for the module of DeepSpeed's Muon, which this package does not use."""

    class MuonWithAuxAdam:
        """An empty class, so that no optimiser is an instance of Muon."""


def start() -> None:
    """Gives DeepSpeed the process group that `distributed.start()` made.

    Raises: VersionError: if this package does not work with the installed DeepSpeed.
    """
    # DeepSpeed probes compilers and linkers, and silences sys.stderr's descriptor meanwhile. In a
    # notebook the compilers write to another one. A process without a terminal may have none.
    with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
        distributed.together(private_names.check)
    # ZeRO tests whether each optimiser is DeepSpeed's Muon. The test imports Muon, and with it
    # torch's whole compiler, which takes a second or two of every start.
    if _MUON not in sys.modules:
        sys.modules[_MUON] = _NoMuon(_MUON)
    ask_once()
    if not torch.cuda.is_available():
        # Otherwise init_distributed compiles a shared-memory extension and dies without a C++
        # compiler; gloo's collectives serve.
        private_names.get("deepspeed.ops:__compatible_ops__")["deepspeed_shm_comm"] = False
    backend = "nccl" if distributed.device().type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    if backend == "gloo":
        collectives = private_names.get("deepspeed.comm.comm:cdb")
        private_names.replace(collectives, "all_gather_into_tensor", gather_in_place)
        private_names.replace(collectives, "reduce_scatter_tensor", scatter_in_place)
        private_names.replace(collectives, "reduce", sum_on_owner)


def stop() -> None:
    """Clears DeepSpeed's global state; called before `distributed.stop()` ends the process group.

    Otherwise a later `start` would find collectives of a process group that is gone.
    """
    forget_engines()
    if isinstance(sys.modules.get(_MUON), _NoMuon):
        del sys.modules[_MUON]
    private_names.replace(private_names.get("deepspeed.comm:comm"), "cdb", None)
    groups = private_names.get("deepspeed.utils:groups")
    private_names.replace(groups, "_WORLD_GROUP", None)


def forget_engines() -> None:
    """Releases the objects that ZeRO-3 keeps alive after `engine.destroy()`.

    DeepSpeed holds every engine through a module stack and an lru_cache in a closure of its
    parameter coordinator. The process group of hpZ is global, and the next engine would use it
    whatever its own configuration; its communicator holds GPU memory until the group is destroyed.
    DeepSpeed also replaces torch's linear function by a slower one that keeps other tensors, which
    would change later counts in this process. So torch's function is put back; `zero.Init` replaces
    it again when it is needed.
    """
    get = private_names.get
    get("deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK").clear()
    coordinator = "deepspeed.runtime.zero.partitioned_param_coordinator"
    for function in vars(get(f"{coordinator}:PartitionedParameterCoordinator")).values():
        cells = getattr(function, "__closure__", None) or ()
        for candidate in (function, *(cell.cell_contents for cell in cells)):
            if hasattr(candidate, "cache_clear"):
                candidate.cache_clear()
    groups = get("deepspeed.utils:groups")
    if (hpz := get("deepspeed.utils.groups:_ZERO_PARAM_INTRA_PARALLEL_GROUP")) is not None:
        deepspeed.comm.destroy_process_group(hpz)
    private_names.replace(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)
    torch.nn.functional.linear = _LINEAR
