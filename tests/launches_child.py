"""`launches_child.py FOLDER SCRIPT FLAGS…` runs a training script; FOLDER/seen-RANK.json then says what dtypes its
first training forward had, and the most memory that the process held. For launches.py."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from models.eigenstates import Eigenvalues
from models.ten import TEN
from train.engine.summary import peak_memory


class Witness:
    """Watches every module until the whole model has been through one forward with gradients."""

    def __init__(self) -> None:
        self.eigenvalues: set[str] = set()  # dtypes of decay and phase: parameters, and what is computed of them
        self.products: set[str] = set()  # of matrix products
        self.hook = register_module_forward_hook(self.see)

    def see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else [output]) if isinstance(t, torch.Tensor)]
        if not torch.is_grad_enabled() or any(t.is_meta for t in tensors):  # an evaluation, or the plan
            return
        if isinstance(module, Eigenvalues):
            self.eigenvalues |= {str(t.dtype) for t in [*module.parameters(), *tensors]}
        if isinstance(module, nn.Linear):
            self.products |= {str(t.dtype) for t in tensors}
        if isinstance(module, TEN) and self.products:
            self.hook.remove()


def main(folder: Path, script: str, *flags: str) -> None:
    witness, sys.argv = Witness(), [script, *flags]
    runpy.run_path(script, run_name="__main__")
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    seen = {"eigenvalues": sorted(witness.eigenvalues), "products": sorted(witness.products)}
    seen |= {"peak_bytes": peak_memory(device), "processes": int(os.environ.get("WORLD_SIZE", "1"))}
    (folder / f"seen-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
