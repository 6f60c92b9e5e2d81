"""Train a TEN language model on text; train/nano.py and its sisters are this script with a size filled in.

accelerate launch train/language.py --config nano --data my_corpus/ notes.jsonl
accelerate launch train/language.py --config nano --tokenizer bytes --parameterization sigmoid --energy_mode spectral
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models.ten import PRESETS, TEN, TENConfig
from tasks.text import TextTask
from train.engine import ConfigError, Results, Trainer, TrainingConfig, parse
from train.engine.backend import process_state
from train.engine.run_folder import write_json
from train.engine.script import sentences
from train.sample import SETTINGS_FILE, SampleSettings, sample_text


@dataclass(frozen=True)
class Recipe:
    """How a size is trained where the flags don't say otherwise."""

    batch_size: int
    lr: float


RECIPES = {
    "nano": Recipe(batch_size=4, lr=2e-3),
}
TINY = TENConfig(vocab_size=257, d_model=32, num_layers=2, num_eigenstates=16, num_heads=2, d_ff=64, max_seq_len=32)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TrainingConfig):
    """Flags of the language scripts."""

    # Size of the model: its shape, sequence length, batch size and learning rate.
    config: str = "nano"
    # Text files, .jsonl, .parquet or folders; the Python standard library's own source when not given.
    data: tuple[Path, ...] = ()
    # Field of .jsonl and .parquet rows that holds the text; text, content, article or document when not given.
    text_field: str | None = None
    # bpe (trained on the training split), bytes, or the path of a tokenizer.json.
    tokenizer: str = "bpe"
    # Rows of the model's embedding; the preset's for bpe, else the tokenizer's own size.
    vocab_size: int | None = None
    # Tokens per item; the preset's when not given.
    seq_len: int | None = None
    batch_size: int | None = None  # type: ignore[assignment]
    lr: float | None = None  # type: ignore[assignment]
    energy_reg_weight: float | None = None
    # state: the mean energy of the eigenstates; spectral: the original's sum of squared magnitudes.
    energy_mode: Literal["state", "spectral"] = "state"
    # exponential: memory as long as the sequence; sigmoid: the original's, which ends at 99.5 tokens.
    parameterization: Literal["exponential", "sigmoid"] = "exponential"
    # Validation windows that an evaluation scores, spread evenly over the split; the default suits a CPU.
    eval_items: int = 16
    # Beginning of the samples that each evaluation writes; train/sample.py writes others.
    prompt: str = "def "

    def problems(self) -> list[str]:
        found = [] if self.config in PRESETS else [f"--config must be one of {', '.join(PRESETS)}, not {self.config}"]
        for name in ("vocab_size", "seq_len", "eval_items"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.energy_reg_weight is not None and not self.energy_reg_weight >= 0:
            found.append(f"--energy_reg_weight must not be negative, not {self.energy_reg_weight}")
        return found + (super().problems() if not found else [])

    def filled_in(self) -> LanguageConfig:
        """With what the size, or --tiny, decides."""
        recipe = RECIPES[self.config]
        seq_len = TINY.max_seq_len if self.tiny else PRESETS[self.config].max_seq_len
        return dataclasses.replace(
            self,
            batch_size=self.batch_size if self.batch_size is not None else recipe.batch_size,
            lr=self.lr if self.lr is not None else recipe.lr,
            seq_len=self.seq_len if self.seq_len is not None else seq_len,
        )


def make_task(config: LanguageConfig) -> TextTask:
    """The text, tokenized by one process of each machine; the others read its cache."""
    state = process_state(config)
    with state.local_main_process_first():
        if config.tiny and not config.data:
            return TextTask.tiny(seq_len=config.seq_len)
        return TextTask(
            config.data or None,
            tokenizer="bytes" if config.tiny else config.tokenizer,
            vocab_size=config.vocab_size or PRESETS[config.config].vocab_size,
            seq_len=config.seq_len,
            text_field=config.text_field,
            eval_items=config.eval_items,
            verbose=state.is_main_process,
        )


def model_config(config: LanguageConfig, tokenizer_size: int) -> TENConfig:
    """The preset with the flags over it. Raises ConfigError when the tokenizer has more tokens than the model rows."""
    preset = TINY if config.tiny else PRESETS[config.config]
    trained_here = config.tokenizer == "bpe" and not config.tiny
    vocab_size = config.vocab_size or (preset.vocab_size if trained_here else tokenizer_size)
    if tokenizer_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size:,} tokens and the model only {vocab_size:,} rows for them; "
            f"give --vocab_size {tokenizer_size} or more, or leave it out"
        )
    changes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_seq_len": config.seq_len,
        "energy_mode": config.energy_mode,
        "parameterization": config.parameterization,
    }
    if config.energy_reg_weight is not None:
        changes["energy_reg_weight"] = config.energy_reg_weight
    return dataclasses.replace(preset, **changes)


class Samples:
    """A hook: after every evaluation, what the model writes from the prompt, in RUN/samples/."""

    def __init__(self, task: TextTask, settings: SampleSettings) -> None:
        self.task, self.settings = task, settings

    def __call__(self, trainer: Trainer, row: dict) -> None:
        if not trainer.backend.is_main:
            return
        folder = trainer.run_dir / "samples"
        if not (folder / SETTINGS_FILE).exists():
            self.task.tokenizer.save(trainer.run_dir)
            write_json(folder / SETTINGS_FILE, asdict(self.settings))
        text = sample_text(trainer.predict.model, self.task.tokenizer, self.settings)
        (folder / f"step-{row['step']:08d}.txt").write_text(text + "\n", encoding="utf-8")
        trainer.book.say(f"sample      {text[:100]!r}")


def main(config: str = "nano", argv: Sequence[str] | None = None) -> Results:
    """Parse the command line, with `config` the size where --config doesn't name one, and train."""
    with sentences():
        settings = parse(LanguageConfig, argv, LanguageConfig(config=config), fill=LanguageConfig.filled_in)
        task = make_task(settings)
        torch.manual_seed(settings.seed)
        model = TEN(model_config(settings, task.tokenizer.vocab_size))
        samples = Samples(task, SampleSettings(prompt=settings.prompt, max_new_tokens=20 if settings.tiny else 100))
        trainer = Trainer(model, settings, task, hooks=[samples])
        trainer.facts["data"] = task.info
        trainer.report["baselines"] = task.baselines()
        return trainer.train()


if __name__ == "__main__":
    main()
