"""The backend that belongs to a launch."""

from __future__ import annotations

from train.engine.backend import Backend
from train.engine.config import TrainingConfig
from train.engine.processes import launched_with


def open_backend(config: TrainingConfig, begun_in: str | None = None) -> Backend:
    """The backend of this launch. begun_in: the precision of the run that goes on, if one does."""
    launch = launched_with()
    if launch == "DeepSpeed":
        from train.engine.zero import ZeroBackend  # here, because few have deepspeed and it takes seconds to import

        return ZeroBackend(config, begun_in)
    if launch == "FSDP2":
        from train.engine.sharded import FSDP2Backend

        return FSDP2Backend(config, begun_in)
    return Backend(config, begun_in)
