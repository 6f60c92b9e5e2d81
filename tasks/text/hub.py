"""Datasets of the Hugging Face Hub as a source of documents, through the `datasets` library."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

from tasks.text.files import choose_field

# The names that people type, with where each lives on the Hub: owner/name, or owner/name:config.
DATASETS = {
    "imdb": "stanfordnlp/imdb",
    "ag_news": "fancyzhx/ag_news",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
    "tinystories": "roneneldan/TinyStories",
    "finewebedu": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "pg19": "emozilla/pg19-test",
    "openwebtext": "Skylion007/openwebtext",
}
ROWS_AT_ONCE = 1000
# WikiText's rows are lines; " = Title = " begins an article, " = = Section = = " does not.
TITLE = re.compile(r" = [^=].*[^=] = \n?")


class HubSource:
    """The training split of a Hub dataset (its only split if it has no "train"), one document a row.

    WikiText's rows are lines: there a document is an article. Raises ValueError for an unknown short name or a wrong
    config, FileNotFoundError (no such dataset), ConnectionError (no Hub) and ImportError (no `datasets`).
    """

    def __init__(self, dataset: str, text_field: str | None) -> None:
        if "/" not in dataset and dataset not in DATASETS:
            close = difflib.get_close_matches(dataset, DATASETS, n=1)
            raise ValueError(
                f"There is no dataset {dataset!r}"
                + (f", did you mean {close[0]}?" if close else ":")
                + f" Give {', '.join(DATASETS)}, or any of the Hub's as owner/name or owner/name:config."
            )
        self.name = dataset
        self.text_field = text_field
        self.path, _, self.config = DATASETS.get(dataset, dataset).partition(":")
        self._builder = _open(self.path, self.config or None)
        self._by_article = self.path.endswith("/wikitext")

    def identity(self) -> list:
        return [self.path, self.config, self.text_field, self._builder.hash]

    def documents(self) -> Iterator[tuple[str, bytes]]:
        _tell(self.path, self._builder.download_and_prepare)
        split, field = self._choose(self._builder.as_dataset())
        batches = split.select_columns([field]).iter(ROWS_AT_ONCE)
        rows = ((None, self._content(text, field)) for batch in batches for text in batch[field])
        for number, (_, content) in enumerate(_articles(rows) if self._by_article else rows):
            yield f"{self.name}:{number}", content

    def stream(self, place: Any = None) -> Iterator[tuple[Any, str, bytes]]:
        split, field = self._choose(_tell(self.path, self._builder.as_streaming_dataset))
        rows = self._streamed(split.select_columns([field]), field, place)
        for where, content in _articles(rows) if self._by_article else rows:
            yield where, f"a document of {self.name}", content

    def _streamed(self, split: Any, field: str, place: Any) -> Iterator[tuple[Any, bytes]]:
        if place is not None:
            split.load_state_dict(place)
        place = split.state_dict()
        for row in split:
            yield place, self._content(row[field], field)
            place = split.state_dict()

    def _choose(self, splits: dict) -> tuple[Any, str]:
        """The split to train on and its text field."""
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"The dataset {self.name} has no split train; it has {', '.join(splits)}.")
        split = splits.get("train", next(iter(splits.values())))
        return split, choose_field(split.column_names, self.text_field, f"dataset {self.name}")

    def _content(self, text: Any, field: str) -> bytes:
        if not isinstance(text, str | None):
            raise ValueError(f"The field {field!r} of {self.name} must hold text, found {type(text).__name__}.")
        return (text or "").encode("utf-8", "surrogatepass")

    # An open dataset holds connections, which a loader's workers make themselves.
    def __reduce__(self) -> tuple:
        return HubSource, (self.name, self.text_field)


def _articles(rows: Iterator[tuple[Any, bytes]]) -> Iterator[tuple[Any, bytes]]:
    """Join lines into articles, each with the place of its first line."""
    start, lines = None, []
    for place, line in rows:
        if lines and TITLE.fullmatch(line.decode("utf-8", "replace")):
            yield start, b"".join(lines)
            lines = []
        if not lines:
            start = place
        lines.append(line)
    if lines:
        yield start, b"".join(lines)


def _open(path: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading {path} from the Hub needs the datasets library: pip install datasets.") from error
    try:
        return _tell(path, datasets.load_dataset_builder, path, config)
    except RuntimeError:  # a dataset that is a script; the Hub keeps a copy of its rows as Parquet
        return _tell(path, datasets.load_dataset_builder, path, config, revision="refs/convert/parquet")


def _tell(path: str, function: Callable, *arguments: Any, **options: Any) -> Any:
    """Call a function of the library; what it raises about the dataset becomes a sentence of the same kind."""
    try:
        return function(*arguments, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"The Hub's dataset {path} is not on this machine and the Hub can't be reached: connect, or give files "
            "with --data."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub has no dataset {path} that this user may read ({_brief(error)}): check the name."
        ) from error
    except ValueError as error:
        raise ValueError(f"The Hub's dataset {path} can't be opened so: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The library's own words, in one line."""
    return " ".join(str(error).split())[:300]
