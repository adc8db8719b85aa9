"""Packaging of fd_large: bounds are the oldest releases that the code was written against."""

from setuptools import find_packages, setup

setup(
    name="fd_large",
    version="0.1.0",
    description="Feature distillation of vision backbones at up to three billion parameters",
    packages=find_packages(include=["fd_large", "fd_large.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        # 0.19.2 failed with frozen parameters under activation checkpointing.
        "deepspeed>=0.19.8",
        "timm>=1.0",
        "einops>=0.8",
        "safetensors>=0.5",
        "tyro>=1.0",
        "rich>=13",
        "numpy>=1.26",
        "pillow>=11",
    ],
    extras_require={
        # fairscale: its checkpoint wrapper moves block inputs to host memory.
        "offload": ["fairscale>=0.4.13"],
        # mpi4py: ranks under mpirun; mpich brings an MPI as a wheel.
        "mpi": ["mpi4py>=4", "mpich>=5"],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "fairscale>=0.4.13",
            "mpi4py>=4",
            "mpich>=5",
        ],
    },
)
