"""A tiny TEN under one launch config after another: loss curves in fp32 and bf16, a resumed run, and what was seen."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from models.ten import TEN, TENConfig
from tests.toy import CLASSES, ToyTask
from train.engine import Trainer, TrainingConfig, summary
from train.engine.script import sentences

STEPS, HALF, BAD = 5, 2, 3  # optimizer steps, where the resumed run begins, and the one that is judged bad
CLIP = 0.3  # every gradient is longer
RESUMED = ("deepspeed_zero2", "deepspeed_zero3", "fsdp2")
TINY = TENConfig(CLASSES, d_model=16, num_layers=2, num_eigenstates=8, num_heads=2, d_ff=32, max_seq_len=8)


class Tokens(ToyTask):
    """The toy's sequences, as a language model takes them; validation has an odd number of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.val.tokens, self.val.lengths = self.val.tokens[:5], self.val.lengths[:5]

    def collate(self, items):
        batch = super().collate(items)
        return {"input_ids": batch["tokens"], "labels": batch["labels"]}

    def evaluate(self, predict):
        right = 0
        for i in predict.share(len(self.val)):
            batch = self.collate([self.val[i]])
            guess = predict({"input_ids": batch["input_ids"]})["logits"].argmax(-1).cpu()
            right += (guess == batch["labels"]).sum().item()
        return {"accuracy": predict.total({"right": right})["right"] / sum(self.val.lengths.tolist())}


class Witness:
    """A hook of the trainer, and hooks in the model: what parameters and streams look like inside forward."""

    def __init__(self, model: nn.Module) -> None:
        self.fp32, self.products, self.generated = set(), set(), None
        for name, module in model.named_modules():
            if {n for n in model.fp32_parameters() if n.rpartition(".")[0] == name}:
                module.register_forward_hook(self.see_eigenvalues)
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.see_product)

    def see_product(self, module, inputs, output):
        if torch.is_grad_enabled():
            self.products.add(str(output.dtype))

    def see_eigenvalues(self, module, inputs, outputs):
        self.fp32 |= {str(t.dtype) for t in [*module.parameters(recurse=False), *outputs]}

    def __call__(self, trainer, row):
        if (model := trainer.predict.whole()) is not None:
            prompt = torch.zeros(1, 3, dtype=torch.int64, device=trainer.backend.device)
            self.generated = model.generate(prompt, 4, temperature=0.0).tolist()


def train(config: TrainingConfig) -> tuple[Trainer, Witness]:
    torch.manual_seed(0)
    model = TEN(TINY)
    witness = Witness(model)
    trainer = Trainer(model, config, Tokens(), hooks=[witness])
    verdict = trainer.guard.verdict
    trainer.guard.verdict = lambda step, *seen: torch.maximum(verdict(step, *seen), torch.tensor(float(step == BAD)))
    with patch.multiple(summary, matmul_rate=lambda *args, **kwargs: 1e12, plot_curves=lambda *args: None):  # slow
        trainer.train()
    return trainer, witness


def cut_back(whole: Path, copy: Path) -> None:
    """A copy of a finished run as it was after HALF its steps."""
    shutil.copytree(whole, copy, symlinks=True)
    for later in range(HALF + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
    (copy / "results.json").unlink()


def both_precisions(folder: Path, resume: bool) -> dict[str, Any]:
    """Leaves folder/{no,bf16}, and folder/resumed if asked; what was seen."""
    ema_decay = 0.0 if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else 0.5
    config = TrainingConfig(
        max_steps=STEPS, batch_size=8, micro_batch_size=2, lr=1e-2, warmup_steps=2, grad_clip=CLIP, ema_decay=ema_decay,
        log_every=1, eval_every=HALF, save_every=HALF, wandb="off",
    )  # fmt: skip
    seen = {}
    for precision in ("no", "bf16"):
        trainer, witness = train(replace(config, mixed_precision=precision, run_dir=folder / precision))
        seen[precision] = {
            "launch": trainer.backend.name,
            "processes": trainer.backend.world_size,
            "fp32": sorted(witness.fp32),
            "products": sorted(witness.products),
            "generated": witness.generated,
            "units": sum(isinstance(module, FSDPModule) for module in trainer.inner.modules()),
        }
    if resume:
        trainer.backend.on_main(lambda: cut_back(folder / "no", folder / "resumed"))
        train(replace(config, mixed_precision="no", run_dir=folder / "resumed"))
    return seen


def main(folder: Path, environments: dict[str, dict[str, str]]) -> None:
    """Under each of `environments`, what accelerate would set, by name: runs and seen.json in a folder of that name."""
    for name, environment in environments.items():
        with sentences(), patch.dict(os.environ, environment):
            seen = both_precisions(folder / name, resume=name in RESUMED)
        if os.environ.get("RANK", "0") == "0":
            (folder / name / "seen.json").write_text(json.dumps(seen))
