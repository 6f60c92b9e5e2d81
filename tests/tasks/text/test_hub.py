"""Hub datasets: which one a name means, what becomes a document, streams from any place, and sentences. No network."""

import json
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.text import TextTask, load_corpus, packing, stream
from tasks.text.corpus import open_source
from tasks.text.hub import DATASETS

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def caches_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()


def dataset(folder, columns: dict[str, list], split="train", files=2) -> str:
    """A folder that the library reads as it reads the Hub's; returns its name."""
    folder.mkdir(exist_ok=True)
    size = -(-len(next(iter(columns.values()))) // files)
    for number in range(files):
        rows = {name: values[number * size : (number + 1) * size] for name, values in columns.items()}
        path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.table(rows), path, row_group_size=7)
    return str(folder)


TEXTS = [f"document {i} " * (1 + i % 7) for i in range(50)]


def test_every_name_is_a_dataset_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *given: asked.append(given))
    for name in (*DATASETS, "owner/name", "owner/name:config"):
        open_source(dataset=name)
    assert ("Salesforce/wikitext", "wikitext-103-raw-v1") in asked and (
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
    ) in asked
    assert asked[-2:] == [("owner/name", None), ("owner/name", "config")] and len(asked) == 9


def test_rows_are_documents_and_the_hash_is_of_their_contents(tmp_path):
    name = dataset(tmp_path / "d", {"id": list(range(50)), "content": [None, *TEXTS[1:]]})
    corpus = load_corpus(dataset=name)
    assert [document.text for document in corpus.documents] == TEXTS[1:] and corpus.num_empty == 1
    assert corpus.source == name
    assert [d.name for d in corpus.documents][:2] == [f"{name}:1", f"{name}:2"]
    assert load_corpus(dataset=name).sha256 == corpus.sha256
    assert load_corpus(dataset=name, subset_size=20).sha256 != corpus.sha256
    dataset(tmp_path / "d", {"id": list(range(50)), "content": [None, *TEXTS[1:-1], "changed"]})
    assert load_corpus(dataset=name).sha256 != corpus.sha256


def test_the_only_split_is_taken_if_there_is_no_train(tmp_path):
    name = dataset(tmp_path / "d", {"text": TEXTS}, split="test")
    assert len(load_corpus(dataset=name).documents) == 50
    dataset(tmp_path / "d", {"text": TEXTS}, split="validation")
    with pytest.raises(ValueError, match="has no split train; it has validation, test"):
        load_corpus(dataset=name)


def test_stream_is_the_same_from_any_place(tmp_path):
    source = open_source(dataset=dataset(tmp_path / "d", {"text": TEXTS, "label": [0] * 50}))
    records = list(source.stream())
    assert [content.decode() for _, _, content in records] == TEXTS
    for start in (0, 6, 7, 24, 25, 49):
        place = json.loads(json.dumps(records[start][0]))
        assert [content for _, _, content in source.stream(place)] == [content for _, _, content in records[start:]]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.identity() == source.identity() and list(copy.stream()) == records


def test_wikitext_lines_are_joined_into_articles(tmp_path):
    lines = ["", " = One = \n", "", " text of one \n", " = = Part = = \n", " more \n", "", " = Two = \n", " 2 = 2 \n"]
    source = open_source(dataset=dataset(tmp_path / "wikitext", {"text": lines}, files=1))
    articles = ["", " = One = \n text of one \n = = Part = = \n more \n", " = Two = \n 2 = 2 \n"]
    assert [content.decode() for _, content in source.documents()] == articles
    records = list(source.stream())
    assert [content.decode() for _, _, content in records] == articles
    assert [content.decode() for _, _, content in source.stream(records[1][0])] == articles[1:]


def test_streamed_task_trains_on_a_dataset(tmp_path, monkeypatch):
    name = dataset(tmp_path / "d", {"text": TEXTS})
    whole = TextTask(dataset=name, tokenizer="bytes", seq_len=16, verbose=False)
    monkeypatch.setattr(stream, "SHARD_TOKENS", 64)
    monkeypatch.setattr(packing, "BATCH_CHARS", 100)
    task = TextTask(dataset=name, streaming=True, tokenizer="bytes", seq_len=16, verbose=False)
    for i in (len(whole.train) - 1, 3, 40, len(whole.train) + 2):
        assert task.train[i]["labels"].tolist() == whole.train[i % len(whole.train)]["labels"].tolist()
    assert task.val.tokens.tolist() == whole.val.tokens.tolist()
    assert whole.info["corpus"] == task.info["corpus"] == name


# ----------------------------------------------------------------------------------------------------------- sentences


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_corpus(dataset="imdb")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (ConnectionError("Couldn't reach"), ConnectionError, "stanfordnlp/imdb is not on this machine and the Hub"),
        (datasets.exceptions.DatasetNotFoundError("no\nsuch"), FileNotFoundError, r"has no dataset .*\(no such\)"),
        (ValueError("Config name is missing.\nPick one"), ValueError, "so: Config name is missing. Pick one"),
    ],
)
def test_what_the_library_raises_is_one_line(monkeypatch, raised, kind, words):
    def refuse(*given):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(kind, match=words) as caught:
        load_corpus(dataset="imdb")
    assert "\n" not in str(caught.value)


def test_datasets_that_are_scripts_are_read_from_their_copy(monkeypatch):
    asked = []

    def builder(path, config, **options):
        asked.append(options)
        if not options:
            raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    open_source(dataset="openwebtext")
    assert asked == [{}, {"revision": "refs/convert/parquet"}]


def test_bad_names_and_fields(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset 'imbd', did you mean imdb\? Give imdb, ag_news"):
        load_corpus(dataset="imbd")
    with pytest.raises(ValueError, match="give paths or dataset 'imdb', not both"):
        load_corpus([tmp_path], dataset="imdb")
    name = dataset(tmp_path / "d", {"title": ["a"], "text": [7]}, files=1)
    with pytest.raises(ValueError, match="must hold text, found int"):
        load_corpus(dataset=name)
    with pytest.raises(ValueError, match="no field named body; it has title, text"):
        load_corpus(dataset=name, text_field="body")
    with pytest.raises(FileNotFoundError, match=r"has no dataset .*nowhere"):
        load_corpus(dataset=str(tmp_path / "nowhere"))
