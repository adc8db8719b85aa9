"""The packages of fd_large, and where they stand; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# They stand at the top level, and travel inside the package (fd_large/shipped.py).
SHIPPED = {"fd_large.ds_configs": "ds_configs", "fd_large.slurm": "slurm"}

setup(
    packages=[*find_packages(include=["fd_large", "fd_large.*"]), *SHIPPED],
    package_dir={"fd_large": "fd_large", **SHIPPED},
)
