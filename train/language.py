"""Train a TEN or HTEN language model on text; train/nano.py and its sisters are this script with a size filled in.

accelerate launch train/language.py --config nano --data my_corpus/ notes.jsonl
accelerate launch train/language.py --config medium --use_hten --dataset wikitext-103
accelerate launch train/language.py --config large --energy_reg_weight 0.05 --dataset finewebedu --max_steps 100000
accelerate launch train/language.py --config nano --tokenizer bytes --parameterization sigmoid --energy_mode spectral
accelerate launch train/language.py --config small --dry_run
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from models.causality import check_causality
from models.ten import PRESETS, TEN, TENConfig
from tasks.text import TextTask
from train.dry_run import dry_run, time_lengths
from train.engine import ConfigError, Results, Trainer, TrainingConfig, parse
from train.engine.guard import TrainingBroken
from train.engine.optim import OptimizerName
from train.engine.processes import process_state
from train.engine.script import sentences
from train.pictures import EnergyPicture, SpectrumPicture
from train.sample import Samples, SampleSettings


@dataclass(frozen=True)
class Recipe:
    """How a size is trained where the flags don't say otherwise."""

    batch_size: int
    lr: float


# nano's are the best of a few five-minute runs on a CPU; the others' batches are the original's, their rates fall with
# the width as GPT-3's do (arXiv 2005.14165, table 2.1).
RECIPES = {
    "nano": Recipe(batch_size=4, lr=2e-3),
    "micro": Recipe(batch_size=16, lr=1e-3),
    "small": Recipe(batch_size=16, lr=8e-4),
    "medium": Recipe(batch_size=16, lr=6e-4),
    "large": Recipe(batch_size=8, lr=5e-4),
    "xlarge": Recipe(batch_size=8, lr=4e-4),
}
TINY = TENConfig(vocab_size=257, d_model=32, num_layers=2, num_eigenstates=16, num_heads=2, d_ff=64, max_seq_len=32)
DEFAULT_SCALES = (1, 2, 4)  # what --use_hten alone means
# Adafactor's rate is a share of each weight's own size; this is torch's default.
ADAFACTOR_LR = 1e-2
# Too large to read at once: these stream unless they are pretokenized or cut to a subset.
LARGE_DATASETS = ("finewebedu", "openwebtext", "pg19")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TrainingConfig):
    """Flags of the language scripts."""

    actions: ClassVar[frozenset[str]] = TrainingConfig.actions | {"dry_run", "dry_samples", "benchmark"}

    # Size of the model: its shape, sequence length, batch size and learning rate.
    config: str = "nano"

    # Text files, .jsonl, .parquet or folders; the Python standard library's own source when not given.
    data: tuple[Path, ...] = ()
    # A data set of the Hub, by a short name (imdb, ag_news, wikitext-103, tinystories, finewebedu, pg19, openwebtext)
    # or as owner/name or owner/name:config; needs the package `datasets`.
    dataset: str | None = None
    # Field of records that holds the text; text, content, article or document when not given.
    text_field: str | None = None
    # Train on this many documents, drawn at random; 0 takes all.
    subset_size: int = 0
    # Tokenize while training, a shard at a time, instead of all before it.
    streaming: bool = False
    # Train on what train/pretokenize.py wrote to --tokenized_dir.
    pretokenized: bool = False
    # tokenized/DATASET when not given.
    tokenized_dir: Path | None = None
    # bpe (trained on the training split), bytes, a tokenizer.json, or a name on the Hub such as gpt2.
    tokenizer: str = "bpe"
    # Rows of the model's embedding; the preset's for bpe, else the tokenizer's own size.
    vocab_size: int | None = None
    # Tokens per item; the preset's when not given.
    seq_len: int | None = None

    batch_size: int | None = None  # type: ignore[assignment]
    lr: float | None = None  # type: ignore[assignment]
    # adamw when not given, or adafactor where the memory holds nothing else.
    optimizer: OptimizerName | None = None  # type: ignore[assignment]
    # AdamW with 8-bit state, from bitsandbytes.
    use_8bit_optim: bool = False
    # Format of the weights themselves. auto: fp32, or bf16 where the memory holds nothing else.
    weights: Literal["auto", "fp32", "bf16"] = "auto"

    # Eigenstates that step 1, 2 and 4 tokens at a time, where the size has none of its own.
    use_hten: bool = False
    # Other scales, such as 1,2,4,8; 1 turns HTEN off.
    hten_scales: str | None = None
    # polyphase: every scale sees every token; hold: it steps once per complete block.
    hten_mode: Literal["polyphase", "hold"] = "polyphase"
    # Decay and phase that depend on the token.
    selective: bool = False
    energy_reg_weight: float | None = None
    # state: the mean energy of the eigenstates; spectral: the original's sum of squared magnitudes.
    energy_mode: Literal["state", "spectral"] = "state"
    # exponential: memory as long as the sequence; sigmoid: the original's, which ends at 99.5 tokens.
    parameterization: Literal["exponential", "sigmoid"] = "exponential"

    # Validation windows that an evaluation scores, spread evenly over the split; the default suits a CPU.
    eval_items: int = 16
    # Beginning of the samples that each evaluation writes; train/sample.py writes others.
    prompt: str = "def "
    # Run --dry_samples items through the model, print shapes, losses and memory, and exit.
    dry_run: bool = False
    dry_samples: int = 2
    # Time forward and backward at lengths 512 … 8192, write benchmark.json into the run folder, and exit.
    benchmark: bool = False

    def problems(self) -> list[str]:
        found = []
        if self.config not in PRESETS:
            nearest = difflib.get_close_matches(self.config, PRESETS, n=1, cutoff=0.0)[0]
            found.append(
                f"--config must be one of {', '.join(PRESETS)}, not {self.config}; the nearest name is {nearest}"
            )
        for name in ("vocab_size", "seq_len", "eval_items", "dry_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.subset_size < 0:
            found.append(f"--subset_size must be a number of documents, or 0 for all, not {self.subset_size}")
        if self.energy_reg_weight is not None and not self.energy_reg_weight >= 0:
            found.append(f"--energy_reg_weight must not be negative, not {self.energy_reg_weight}")
        if self.use_8bit_optim and self.optimizer not in (None, "adamw8bit"):
            found.append(f"--use_8bit_optim is --optimizer adamw8bit, and --optimizer {self.optimizer} is given too")
        if self.hten_scales is not None and not all(s.strip().isdecimal() for s in self.hten_scales.split(",")):
            found.append(f"--hten_scales must be whole numbers with commas between, as 1,2,4, not {self.hten_scales!r}")
        sources = [n for n in ("data", "dataset") if getattr(self, n)]
        if len(sources) == 2:
            found.append("--data and --dataset both name the text; give one of them")
        if self.pretokenized and (self.streaming or self.subset_size):
            found.append("--pretokenized takes the folder as it is; leave out --streaming and --subset_size")
        if not found and self.streams and self.max_steps is None and self.max_minutes is None and self.max_cost is None:
            found.append("a stream has no epochs; give --max_steps, --max_minutes or --max_cost")
        elif not found and self.streams and self.epochs is not None:
            found.append("a stream has no epochs; give --max_steps, --max_minutes or --max_cost instead of --epochs")
        # The rest compares numbers that the size fills in.
        return found + (super().problems() if not found else [])

    @property
    def streams(self) -> bool:
        large = self.dataset in LARGE_DATASETS and not self.pretokenized and not self.subset_size
        return self.streaming or large

    @property
    def scales(self) -> tuple[int, ...] | None:
        """What the flags say of the scales, None where they say nothing."""
        if self.hten_scales is not None:
            return tuple(int(s) for s in self.hten_scales.split(","))
        return DEFAULT_SCALES if self.use_hten and PRESETS[self.config].hten_scales == (1,) else None

    def filled_in(self) -> LanguageConfig:
        """With what the size, or --tiny, decides."""
        recipe = RECIPES[self.config]
        optimizer = "adamw8bit" if self.use_8bit_optim else self.optimizer
        lr = ADAFACTOR_LR if optimizer == "adafactor" else recipe.lr
        seq_len = TINY.max_seq_len if self.tiny else PRESETS[self.config].max_seq_len
        return dataclasses.replace(
            self,
            batch_size=self.batch_size if self.batch_size is not None else recipe.batch_size,
            lr=self.lr if self.lr is not None else lr,
            optimizer=optimizer,
            seq_len=self.seq_len if self.seq_len is not None else seq_len,
        )

    def fittings(self, sharded: bool) -> list[dict[str, Any]]:
        """Where nothing else fits, Adafactor, then bf16 weights: these two do change how the model learns."""
        plain, *savers = super().fittings(sharded)
        if self.optimizer is None:
            plain |= {"optimizer": "adamw"}
        if self.optimizer is None and not sharded:
            lr = ADAFACTOR_LR if self.lr == RECIPES[self.config].lr else self.lr
            savers.append({"optimizer": "adafactor", "lr": lr})
        if self.weights == "auto":
            plain |= {"weights": "fp32"}
        if self.weights == "auto" and not sharded:
            savers.append({"weights": "bf16"})
        return [plain, *savers]


def model_config(config: LanguageConfig, tokenizer_size: int) -> TENConfig:
    """The preset with the flags over it. Raises ConfigError when the tokenizer has more tokens than the model rows."""
    preset = TINY if config.tiny else PRESETS[config.config]
    trained_here = config.tokenizer == "bpe" and not (config.tiny or config.pretokenized)
    vocab_size = config.vocab_size or max(tokenizer_size, preset.vocab_size if trained_here else 0)
    if tokenizer_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size:,} tokens and the model only {vocab_size:,} rows for them; "
            f"give --vocab_size {tokenizer_size} or more, or leave it out"
        )
    changes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_seq_len": config.seq_len,
        "hten_mode": config.hten_mode,
        "selective": config.selective,
        "energy_mode": config.energy_mode,
        "parameterization": config.parameterization,
        # --tiny shrinks a size; it stays the HTEN that it is.
        "hten_scales": config.scales or PRESETS[config.config].hten_scales,
        "energy_reg_weight": PRESETS[config.config].energy_reg_weight,
    }
    if config.energy_reg_weight is not None:
        changes["energy_reg_weight"] = config.energy_reg_weight
    return dataclasses.replace(preset, **changes)


class LanguageTask(TextTask):
    """Text, with every score preceded by a proof that the model cannot have looks ahead to thank for it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.causality: dict[str, Any] = {}  # of the newest check, for results.json

    def evaluate(self, predict: Any) -> dict[str, float]:
        self.check(predict)
        return super().evaluate(predict)

    def check(self, predict: Any) -> None:
        self.causality.update(check_causality(predict.model))
        if not self.causality["causal"]:
            raise TrainingBroken(
                f"the model sees the future: changing tokens moved a prediction before them ({self.causality}), so its "
                "scores would mean nothing; this is a defect of the model's code"
            )

    def checked(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """A hook: the process that evaluated may have been killed before it could write what it found."""
        if not self.causality:
            self.check(trainer.predict)


def make_task(config: LanguageConfig) -> LanguageTask:
    """The text, tokenized by one process of each machine; the others read its cache."""
    state = process_state(config)
    with state.local_main_process_first():
        if config.tiny and not (config.data or config.dataset or config.pretokenized or config.streaming):
            return LanguageTask.tiny(seq_len=config.seq_len)
        folder = config.tokenized_dir or Path("tokenized") / (config.dataset or "data").replace("/", "--")
        return LanguageTask(
            config.data or None,
            dataset=config.dataset,
            subset_size=config.subset_size,
            streaming=config.streams,
            pretokenized=folder if config.pretokenized else None,
            tokenizer="bytes" if config.tiny and not config.pretokenized else config.tokenizer,
            vocab_size=config.vocab_size or PRESETS[config.config].vocab_size,
            seq_len=config.seq_len,
            text_field=config.text_field,
            eval_items=config.eval_items,
            verbose=state.is_main_process,
        )


def main(config: str = "nano", argv: Sequence[str] | None = None) -> Results | None:
    """Parse the command line, with `config` the size where --config doesn't name one, and train."""
    with sentences():
        settings = parse(LanguageConfig, argv, LanguageConfig(config=config), fill=LanguageConfig.filled_in)
        task = make_task(settings)
        shape = model_config(settings, task.tokenizer.vocab_size)

        def build(settings: LanguageConfig) -> TEN:
            model = TEN(shape)
            if settings.weights == "bf16":
                for parameter in model.parameters():  # model.to() is not for models that are only planned (torch 2.13)
                    parameter.data = parameter.data.to(torch.bfloat16)
            return model

        samples = SampleSettings(prompt=settings.prompt, max_new_tokens=20 if settings.tiny else 100)
        hooks = [task.checked, Samples(task.tokenizer, samples), SpectrumPicture(), EnergyPicture()]
        trainer = Trainer(build, settings, task, hooks)
        if settings.dry_run:
            return dry_run(trainer, settings.dry_samples)
        if settings.benchmark:
            return time_lengths(trainer)
        trainer.facts["data"] = task.info
        trainer.report |= {"baselines": task.baselines(), "causality": task.causality}
        return trainer.train()


if __name__ == "__main__":
    main()
