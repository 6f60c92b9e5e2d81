"""Write text with a trained language model.

    python train/sample.py runs/nano/20260101-120000                       # the run's own sample again
    python train/sample.py RUN --prompt "def main(" --temperature 0.8 --max_new_tokens 200

RUN is a run folder (its newest checkpoint is used) or a folder in its checkpoints/. Averaged weights are used where the
run kept them, as its evaluations did. Sampling runs on the CPU in fp32, so that the same seed gives the same text.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from models.ten import TEN, TENConfig
from tasks.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from train.engine import ConfigError, Trainer
from train.engine.checkpoint import find_checkpoint, load_weights
from train.engine.metrics import Row
from train.engine.run_folder import read_json, weights_of, write_json
from train.engine.script import sentences

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to sample. RUN/samples/settings.json holds those of the run's own samples."""

    prompt: str = "def "
    max_new_tokens: int = 100
    # 0 takes the likeliest token each time.
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0


def sample_text(model: TEN, tokenizer: Tokenizer, settings: SampleSettings) -> str:
    """The prompt and its continuation, to the end of the text if the model comes to one."""
    prompt = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(settings.prompt).tolist()]])
    tokens = model.generate(
        prompt.to(model.embedding.weight.device),
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=torch.Generator(model.embedding.weight.device).manual_seed(settings.seed),
        eos_id=tokenizer.eos_id,
    )
    return tokenizer.decode([t for t in tokens[0].tolist() if t != tokenizer.eos_id])


class Samples:
    """A hook: after every evaluation, what the model writes from the prompt, in RUN/samples/."""

    def __init__(self, tokenizer: Tokenizer, settings: SampleSettings) -> None:
        self.tokenizer, self.settings, self._kept = tokenizer, settings, False

    def __call__(self, trainer: Trainer, row: Row) -> None:
        model = trainer.predict.whole()
        if model is None:
            return
        folder = trainer.run_dir / "samples"
        if not self._kept:  # anew in every process: they may have been damaged meanwhile
            self.tokenizer.save(trainer.run_dir)
            write_json(folder / SETTINGS_FILE, asdict(self.settings))
            self._kept = True
        text = sample_text(model, self.tokenizer, self.settings)
        (folder / f"step-{row['step']:08d}.txt").write_text(text + "\n", encoding="utf-8")
        trainer.book.say(f"sample      {text[:100]!r}")


def load(run: Path) -> tuple[TEN, Tokenizer, SampleSettings]:
    """Model, tokenizer and sample settings of a run folder or checkpoint. Raises ConfigError."""
    folder = find_checkpoint(run, lambda line: print(line, file=sys.stderr))
    model = TEN(TENConfig(**read_json(folder / "config.json")))
    load_weights(model, weights_of(folder))
    run_dir = folder.parent.parent
    file = run_dir / "samples" / SETTINGS_FILE
    try:
        settings = SampleSettings(**read_json(file))
    except TypeError as error:
        raise ConfigError(f"{file} is damaged: {error}; the run's next evaluation writes it anew") from error
    return model.eval(), load_tokenizer(run_dir / TOKENIZER_FILE), settings


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Flags of train/sample.py; what isn't given is as in the run's own samples."""

    # Run folder, or a folder in its checkpoints/.
    run: Annotated[Path, tyro.conf.Positional]
    prompt: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


def main() -> None:
    config = tyro.cli(SampleConfig, description=__doc__)
    with sentences():
        model, tokenizer, settings = load(config.run)
        given = {f.name: getattr(config, f.name) for f in fields(settings) if getattr(config, f.name) is not None}
        print(sample_text(model, tokenizer, replace(settings, **given)))


if __name__ == "__main__":
    main()
