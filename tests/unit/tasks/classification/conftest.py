"""A task in a real DeepSpeed engine, on one rank of this process."""

from unit.engine.conftest import make_engine, one_rank

__all__ = ["make_engine", "one_rank"]
