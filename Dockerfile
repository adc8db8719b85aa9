# fd_large with DeepSpeed's operators built beforehand: hundreds of ranks that each compile them at
# the first start, on a shared file system, are slow and get into each other's way.
#
#   docker build -t fd_large --build-arg BASE=pytorch/pytorch@sha256:... .
#   docker build -t fd_large --build-arg BASE=... --build-arg ARCHITECTURES=9.0 .
#
# On a cluster the image runs under enroot or apptainer: docs/clusters.md. Build it on a machine
# with the same processors as the cluster's nodes: CPUAdam is compiled for the builder's own.

# The base has the torch that is tested (pyproject.toml), and the compiler of the same CUDA ("devel"):
# pytorch/pytorch:2.13.0-cuda12.6-cudnn9-devel. It is given by its digest, since a tag may name
# another image tomorrow; docs/clusters.md looks the digest up.
ARG BASE
FROM ${BASE}
ARG BASE
RUN printf '%s' "$BASE" | grep -Eq '^[^@]+@sha256:[0-9a-f]{64}$' || \
    { echo "BASE: an image without its digest; got '$BASE', expected NAME@sha256:DIGEST." \
    "Look the digest up as docs/clusters.md shows, and give --build-arg BASE=..." >&2; exit 1; }
RUN python -c "import torch; assert torch.__version__.split('+')[0] == '2.13.0', torch.__version__"

# libaio: DeepSpeed's AsyncIO, for offload to NVMe. git: the commit in environment.json.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libaio-dev git && \
    rm -rf /var/lib/apt/lists/*

# There is no GPU while an image is built, so the kinds have to be named: A100 8.0, H100 9.0.
ARG ARCHITECTURES="8.0;9.0"
ENV TORCH_CUDA_ARCH_LIST=${ARCHITECTURES}

WORKDIR /opt/fd_large
COPY setup.py pyproject.toml README.md LICENSE ./
COPY fd_large fd_large
COPY ds_configs ds_configs
COPY slurm slurm

# DeepSpeed builds against the torch that is here, hence without an environment of its own for the
# build, and without a GPU to be seen it would build for CPUs. The rest comes as wheels.
RUN pip install --no-cache-dir setuptools wheel ninja py-cpuinfo packaging && \
    DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 DS_BUILD_AIO=1 \
    pip install --no-cache-dir --no-build-isolation '.[quickstart,open_clip,offload,detection]'

# What was not built shows here rather than on 64 ranks.
RUN python -c "from deepspeed.git_version_info import accelerator_name, installed_ops; \
    missing = [op for op in ('fused_adam', 'cpu_adam', 'async_io') if not installed_ops[op]]; \
    assert accelerator_name == 'cuda' and not missing, (accelerator_name, missing)"

# Not root: a run needs no more than its data and its folder. Give `docker run` the user that owns
# them: --user "$(id -u):$(id -g)".
RUN useradd --create-home fd_large
USER fd_large
WORKDIR /home/fd_large
