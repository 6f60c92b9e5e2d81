"""TEN and HTEN beside a GPT-2 and a Llama of as many parameters: speed of training and decoding, memory, and quality.

    python benchmarks/language.py speed                                        # nano, 50257 classes, fp32, on the CPU
    python benchmarks/language.py speed --vocab bytes --memory --csv speed.csv
    python benchmarks/language.py speed --device cuda --precision bf16 --preset medium --tokens 65536 --compile
    python benchmarks/language.py decode --prompts 128 2048 8192
    python benchmarks/language.py quality --tokens 500000 --seeds 0 1 2 --jobs 2 --csv quality.csv

speed: an optimizer step (forward, backward, fused AdamW) of random tokens. All models take turns in one process, and a
large matmul with them: `share` is the step's FLOPs over what that matmul reaches. `peak_mib` is the most that a model,
its optimizer and a step hold: allocated on a GPU; on a CPU the growth of a process of its own.
decode: greedy tokens, one row, after prompts of growing length: does the cost grow?
quality: bits per byte at equal parameters, tokens and trials of the learning rate (benchmarks/language_quality.py).
Speeds are medians, p20 and p80 the 20th and 80th percentile. benchmarks/language_peers.py builds the models.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.language_peers import MODELS
from benchmarks.language_quality import MAX_SEEDS, Ledger, Recipe, compare
from benchmarks.language_speed import DTYPES, Device, Row, decoding_speed, training_speed
from benchmarks.ops import machine
from models.ten import PRESETS, TENConfig

PEERS = {
    "speed": ["ten", "hten", "gpt2", "llama", "llama_our_head", "mamba2", "gated_deltanet"],
    "decode": ["ten", "hten", "gpt2", "llama", "mamba2", "gated_deltanet"],
    "quality": ["ten", "ten_no_energy", "hten", "selective", "llama"],
}
CLASSES = {"bpe": 50257, "bytes": 257}
TINY = TENConfig(vocab_size=257, d_model=64, num_layers=2, num_eigenstates=16, num_heads=2, d_ff=640, max_seq_len=32)


def keep(rows: Iterable[Row], path: Path | None, facts: Row) -> list[Row]:
    """Print a Markdown table row by row, and write it to a csv file as it grows: an interrupted one is not lost."""
    table = []
    for row in rows:
        if not table:
            print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(row.values()) + " |", flush=True)
        table.append(row | facts)
        if path is not None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(table[0]))
                writer.writeheader()
                writer.writerows(table)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, peers in PEERS.items():
        part = parts.add_parser(name)
        part.add_argument("--peers", nargs="+", choices=MODELS, default=peers)
        part.add_argument("--preset", choices=PRESETS, default="nano")
        part.add_argument("--tiny", action="store_true", help="a shape and data that take seconds, to try things")
        part.add_argument("--vocab", choices=CLASSES, default="bytes" if name == "quality" else "bpe")
        part.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        part.add_argument("--precision", choices=DTYPES, default="fp32")
        part.add_argument("--csv", type=Path, help="where rows go; of quality, where finished runs are found again")
    speed, decode, quality = (parts.choices[name] for name in PEERS)
    speed.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    speed.add_argument("--tokens", type=int, default=8192, help="per optimizer step, the same at every length")
    speed.add_argument("--memory", action="store_true", help="measure peak memory, on a CPU in extra processes")
    speed.add_argument("--compile", action="store_true", help="torch.compile all models")
    decode.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048, 8192])
    for part in (speed, decode):
        part.add_argument("--seconds", type=float, default=60.0, help="of measuring at each length, about")
    quality.add_argument("--tokens", type=int, default=500_000, help="of a long run")
    quality.add_argument("--sweep_tokens", type=int, help="of a run of the sweep; a quarter of a long one by default")
    quality.add_argument("--lr", type=float, nargs="+", default=[7e-4, 2e-3, 6e-3])
    quality.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    quality.add_argument("--batch_size", type=int, default=4, help="windows per optimizer step")
    quality.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores")
    options = parser.parse_args(argv)
    if problems := problems_of(options):
        parser.error("; ".join(problems))
    return options


def problems_of(options: argparse.Namespace) -> list[str]:
    """Each in words, with what would be right."""
    problems = []
    for name in ("lengths", "tokens", "prompts", "sweep_tokens", "batch_size", "jobs", "lr"):
        values = getattr(options, name, None) or []
        if any(value <= 0 for value in (values if isinstance(values, list) else [values])):
            problems.append(f"--{name} must be above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda needs a GPU that torch sees; leave it out to run on the CPU")
    seeds = getattr(options, "seeds", [])
    if len(seeds) > MAX_SEEDS or len(set(seeds)) < len(seeds):
        problems.append(f"--seeds must be at most {MAX_SEEDS} different numbers")
    return problems


def rows_of(options: argparse.Namespace, facts: Row) -> Iterable[Row]:
    preset = TINY if options.tiny else PRESETS[options.preset]
    # Without the preset's scales, which are HTEN's: this is the TEN whose parameters all models have.
    base = dataclasses.replace(preset, vocab_size=CLASSES[options.vocab], hten_scales=(1,))
    device = Device(options.device, options.precision)
    if options.part == "speed":
        return training_speed(
            options.peers,
            base,
            device,
            lengths=options.lengths,
            tokens_per_step=options.tokens,
            seconds=options.seconds,
            memory=options.memory,
            compiled=options.compile,
        )
    if options.part == "decode":
        return decoding_speed(options.peers, base, device, prompts=options.prompts, seconds=options.seconds)
    threads = max(1, torch.get_num_threads() // options.jobs)
    recipe = Recipe(base, options.vocab, options.batch_size, device, threads, options.tiny)
    return compare(
        options.peers,
        rates=options.lr,
        seeds=options.seeds,
        tokens=options.tokens,
        sweep_tokens=options.sweep_tokens or options.tokens // 4,
        ledger=Ledger(options.csv, recipe, facts),
        jobs=options.jobs,
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = parse(argv)
    facts = machine(options.device) | {"precision": options.precision, "vocab": options.vocab}
    facts["preset"] = "tiny" if options.tiny else options.preset
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()), flush=True)
    # The quality part keeps its runs in the csv itself.
    return keep(rows_of(options, facts), None if options.part == "quality" else options.csv, facts)


if __name__ == "__main__":
    main()
