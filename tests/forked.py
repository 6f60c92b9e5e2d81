"""Processes forked from the tests' own: what it has imported, they need not, and SIGKILL is SIGKILL."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState

LONGEST = 300  # seconds, rather than hang


def fork(work: Callable[[], object], environment: dict[str, str] | None = None) -> int:
    """The id of a process that does `work`, and ends with 0, with what SystemExit says, or, after any error, with 1."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(LONGEST)
            torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
            os.environ.update(environment or {})
            AcceleratorState._reset_state(reset_partial_state=True)
            work()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for it; how it ended, as subprocess has it: -9 is SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def launch(work: Callable[[], object], processes: int = 2, **environment: str) -> list[int]:
    """`work` in processes that find each other as a launcher's do, and which nobody ends but they themselves; how each
    ended. RANK says which it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [ended(child) for child in [fork(work, rank) for rank in ranks]]
