"""The script: flags, a folder that is whole or absent, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tasks.text import TextTask
from train import pretokenize
from train.engine import ConfigError
from train.pretokenize import PretokenizeConfig


@pytest.fixture
def corpus(tmp_path):
    lines = (json.dumps({"text": f"some text of document {i}\n" * 3}) for i in range(100))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


def run(corpus, folder, **flags):
    settings = {"tokenizer": "bytes", "chunk_size": 512, **flags}
    return pretokenize.pretokenize(PretokenizeConfig(data=(corpus,), output_dir=folder, **settings))


def test_command_writes_what_training_reads(corpus, tmp_path, run_command):
    flags = "--tokenizer bpe --vocab_size 300 --chunk_size 256 --num_proc 2 --batch_size 30"
    status, said = run_command(
        f"python train/pretokenize.py --data {corpus} {flags} --output_dir {tmp_path}/new/tokens"
    )
    assert status == 0, said
    metadata = json.loads((tmp_path / "new" / "tokens" / "metadata.json").read_text())
    assert f"{metadata['total_tokens']:,} tokens, {metadata['num_chunks']} chunks" in said
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "tokens"]
    task = TextTask(pretokenized=tmp_path / "new" / "tokens", seq_len=32, verbose=False)
    direct = TextTask([corpus], vocab_size=300, seq_len=32, verbose=False)
    for split in ("train", "val"):
        assert getattr(task, split).tokens.tolist() == getattr(direct, split).tokens.tolist()

    status, said = run_command(f"python train/pretokenize.py --data {corpus} --output_dir {tmp_path}/new/tokens")
    assert status == 2 and said.startswith("error: --output_dir") and "--force replaces them" in said
    status, said = run_command(f"python train/pretokenize.py --data {tmp_path}/nowhere --output_dir {tmp_path}/other")
    assert status == 2 and "There is no file or folder" in said and not (tmp_path / "other").exists()


def test_forced_run_replaces_chunks_and_nothing_else(corpus, tmp_path):
    first = run(corpus, tmp_path / "c")
    assert run(corpus, tmp_path / "c", subset_size=50, force=True)["total_tokens"] < first["total_tokens"]
    assert len(list((tmp_path / "c").glob("chunk_*.pt"))) < first["num_chunks"]
    with pytest.raises(ConfigError, match="holds something other than chunks"):
        run(corpus, tmp_path, force=True)
    assert corpus.exists()


def test_broken_run_leaves_what_was_there(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").glob("*.*")}

    def fail(writer, tokenizer):
        raise OSError("Cannot write")

    monkeypatch.setattr("tasks.text.chunks.ChunkWriter.close", fail)
    with pytest.raises(OSError, match="Cannot write"):
        run(corpus, tmp_path / "c", force=True, chunk_size=100)
    assert {path: path.read_bytes() for path in (tmp_path / "c").glob("*.*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "data.jsonl"]


def test_bad_flags_are_named_at_once(corpus, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--chunk_size must be 2 to 2147483648, not 1; --batch_size must be 1 to .*, not 0"
    ):
        run(corpus, tmp_path / "c", chunk_size=1, batch_size=0)
    with pytest.raises(ConfigError, match="is a file"):
        run(corpus, corpus)
    (tmp_path / "one.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ConfigError, match=r"the text is 1 document"):
        run(tmp_path / "one.jsonl", tmp_path / "c")
