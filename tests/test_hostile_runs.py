"""What a run or a solver has written and finds damaged: the numbers go on, and what cannot be read is said in a
sentence. With `-m slow` in twenty times as many ways."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from models.ten import TEN, TENConfig
from tasks.text.chunks import METADATA_FILE, read_chunks
from tasks.text.tokenizer import TOKENIZER_FILE, ByteTokenizer, load_tokenizer
from tests.hostile import accepts_or_refuses, damaged, damaged_bytes, damaged_json, hostile
from train.arc_solve import Partial
from train.pictures import EnergyPicture
from train.pretokenize import PretokenizeConfig, pretokenize
from train.sample import SETTINGS_FILE, Samples, SampleSettings

TINY = TENConfig(257, d_model=16, num_layers=1, num_eigenstates=4, num_heads=2, d_ff=16, max_seq_len=8)
HEADER = {"checkpoint": "x", "views": 1}
ANSWERS = [{"a": [[[[1]], [[2, 3]]]]}, {"b": [[[[0]]], [[[1], [2]]]]}, {"c": [[[[5]]]]}]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> SimpleNamespace:
    """As much of a Trainer as the hooks of a language model see."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "samples").mkdir()
    (run_dir / "plots").mkdir()
    torch.manual_seed(0)
    model = TEN(TINY).eval()
    window = {"input_ids": torch.arange(8)[None], "reset": torch.zeros(1, 8, dtype=torch.bool)}
    return SimpleNamespace(
        run_dir=run_dir,
        predict=SimpleNamespace(whole=lambda: model),
        task=SimpleNamespace(val=[window], collate=lambda items: items[0]),
        backend=SimpleNamespace(move=lambda batch: batch, autocast=nullcontext),
        book=SimpleNamespace(say=lambda *lines: None),
    )


@hostile(25)
def test_the_energies_of_a_run(data, trainer):
    """Whatever became of the file of a picture, the run goes on, and keeps this evaluation's."""
    file = trainer.run_dir / "energy.jsonl"
    file.unlink(missing_ok=True)
    for step in (2, 4):
        EnergyPicture()(trainer, {"step": step})
    sound = file.read_bytes()
    lines = [json.dumps(damaged(data, json.loads(line))).encode() for line in sound.splitlines()]
    file.write_bytes(data.draw(st.sampled_from((damaged_bytes(data, sound), b"\n".join([*lines, b""])))))
    EnergyPicture()(trainer, {"step": 6})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["scales"] == json.loads(sound.splitlines()[0])["scales"]


def test_what_samples_are_taken_with_is_mended_by_the_next_evaluation(trainer):
    for file in (trainer.run_dir / TOKENIZER_FILE, trainer.run_dir / "samples" / SETTINGS_FILE):
        Samples(ByteTokenizer(), SampleSettings(max_new_tokens=1))(trainer, {"step": 2})
        sound = file.read_bytes()
        file.write_bytes(sound[: len(sound) // 2])
        Samples(ByteTokenizer(), SampleSettings(max_new_tokens=1))(trainer, {"step": 4})
        assert file.read_bytes() == sound
    assert load_tokenizer(trainer.run_dir / TOKENIZER_FILE).encode("a").tolist() == [97]


@hostile(25)
def test_answers_so_far(data, tmp_path_factory):
    """Those before the first damaged one count, and each that counts is one."""
    file = tmp_path_factory.mktemp("answers") / "submission.json.partial"
    partial = Partial(file, HEADER)
    lines = [json.dumps(HEADER), *map(json.dumps, ANSWERS)]
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = damaged_json(data, json.loads(lines[number])).decode(errors="surrogateescape")
    file.write_bytes("\n".join([*lines, ""]).encode(errors="surrogateescape"))

    def read() -> None:
        nonlocal partial
        partial = Partial(file, HEADER)
        for tests in partial.answers.values():
            assert all(torch.tensor(grid).dim() == 2 for tried in tests for grid in tried)
        assert Partial(file, HEADER).answers == partial.answers  # as it was written again

    accepts_or_refuses(read)
    if number > 1:
        assert partial.answers["a"] == ANSWERS[0]["a"]


# ---- chunks that a script writes -------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([-(10**30), -1, 0, 1, 2, 3, 256, 257, 10**6, 2**31, 2**63, 10**30])


@hostile(25)
def test_pretokenize_leaves_whole_chunks_or_none(data, tmp_path_factory):
    """Whatever it is told and given; what it leaves is read back, and holds what it says."""
    folder = tmp_path_factory.mktemp("chunks")
    lines = [json.dumps({"text": f"document {i} " * (i % 3 + 1)}).encode() for i in range(8)]
    sound = b"\n".join(lines)
    (folder / "a.jsonl").write_bytes(data.draw(st.sampled_from((sound, damaged_bytes(data, sound)))))
    (folder / "b.txt").write_bytes(data.draw(st.binary(max_size=40)))
    names = ("vocab_size", "chunk_size", "max_chunks", "subset_size", "batch_size")
    given = {name: data.draw(NUMBERS) for name in data.draw(st.sets(st.sampled_from(names), max_size=3))}
    tokenizer = data.draw(st.sampled_from(["bytes", "bytes", "bpe", "", "no/such/tokenizer.json", "\0"]))
    corpus = (folder / "a.jsonl", folder / "b.txt")
    asked = PretokenizeConfig(
        data=corpus, output_dir=folder / "out", tokenizer=tokenizer, **{"vocab_size": 300, "chunk_size": 16, **given}
    )
    accepts_or_refuses(pretokenize, asked)
    assert {f.name for f in folder.iterdir()} <= {"a.jsonl", "b.txt", "out"}
    if (folder / "out").exists():
        read = read_chunks(folder / "out", seq_len=1)
        said = json.loads((folder / "out" / METADATA_FILE).read_text())
        assert [len(read.train.tokens), len(read.val.tokens)] == [said[split]["tokens"] for split in ("train", "val")]
