"""A model's folder is read back whole, or refused in a sentence. (That each family comes back is in its tests.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models.hub import HubModel
from models.ten import TEN

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def rewritten(**changed: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changed}))

    return rewrite


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["norm.weight"]
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut(CONFIG), "JSONDecodeError"),
        (cut(WEIGHTS), "SafetensorError"),
        (write(CONFIG, "[1, 2]"), "AttributeError"),
        (write(CONFIG, "\ud7ff" * 3), "JSONDecodeError"),
        (write(CONFIG, "[" * 100_000), "RecursionError"),
        (write(WEIGHTS, ""), "SafetensorError"),
        (lambda folder: (folder / CONFIG).unlink(), "config"),
        (lambda folder: (folder / WEIGHTS).unlink(), "No such file"),
        (rewritten(d_model=-1), "d_model"),
        (rewritten(d_model="wide"), "TypeError"),
        (rewritten(vocab_size=33), "size mismatch"),
        (without_a_weight, r"norm\.weight"),
    ],
)
def test_a_folder_that_is_not_a_whole_model_is_refused_in_a_sentence(tmp_path, tiny_ten, harm, says):
    tiny_ten().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)does not hold a TEN as save_pretrained writes it.*{says}"):
        TEN.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["runs/nano/a/last", Path("no such folder")])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(path):
    with pytest.raises(ValueError, match="neither a folder nor the name of a model on the Hub"):
        TEN.from_pretrained(path)


def test_a_smaller_promise_can_be_asked_for(tmp_path, tiny_ten):
    tiny_ten().save_pretrained(tmp_path)
    without_a_weight(tmp_path)
    assert isinstance(TEN.from_pretrained(tmp_path, strict=False), HubModel)
