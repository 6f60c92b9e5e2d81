"""Tokenizers are exact: every text comes back, and its tokens' byte lengths add up to its bytes."""

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tasks.text import BPETokenizer, ByteTokenizer, load_tokenizer
from tasks.text.tokenizer import EOS_TOKEN

TRAINING_TEXTS = ["def forward(self, x):\n    return self.linear(x)\n" * 20, "for i in range(10):\n    print(i)\n" * 20]
KINDS = {"bytes": ByteTokenizer(), "bpe": BPETokenizer.train(TRAINING_TEXTS, vocab_size=290)}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text() | st.text(alphabet=" \n\t\rdefor(x)é\u0301\U0001f642") | st.just(f"a {EOS_TOKEN} b"))
def test_round_trip_is_exact(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids and (len(ids) == 0 or ids.max() < tokenizer.vocab_size)


def test_ids_and_sizes():
    assert KINDS["bytes"].vocab_size == 257 and KINDS["bytes"].eos_id == 256
    np.testing.assert_array_equal(KINDS["bytes"].encode("aé"), [0x61, 0xC3, 0xA9])
    assert KINDS["bpe"].vocab_size == 290 and KINDS["bpe"].eos_id == 0
    assert len(KINDS["bpe"].encode(TRAINING_TEXTS[0])) < len(TRAINING_TEXTS[0]) / 2
    for tokenizer in KINDS.values():
        assert tokenizer.token_bytes[tokenizer.eos_id] == 0 and tokenizer.decode([tokenizer.eos_id]) == ""
        assert tokenizer.encode("").dtype == tokenizer.dtype == np.uint16


def test_batch_equals_singles_and_broken_utf8_decodes(tokenizer):
    texts = ["one", "", "zwölf"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    half = [tokenizer.pieces.index(b"\xc3")]
    assert tokenizer.decode(half) == "\ufffd" and tokenizer.decode_bytes(half) == b"\xc3"
    for wrong in (-100, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="Token ids must lie in"):
            tokenizer.decode([0, wrong])


def test_save_and_load(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    for source in (path, tmp_path):
        loaded = load_tokenizer(source)
        assert type(loaded) is type(tokenizer) and loaded.eos_id == tokenizer.eos_id
        assert loaded.pieces == tokenizer.pieces and loaded.to_json() == tokenizer.to_json()
        # What is not in the file must be set again: a document that spells a special token.
        np.testing.assert_array_equal(loaded.encode(f"x{EOS_TOKEN}"), tokenizer.encode(f"x{EOS_TOKEN}"))


def test_training_is_deterministic_and_may_fall_short_of_the_size():
    again = BPETokenizer.train(iter(TRAINING_TEXTS), vocab_size=290)
    assert again.to_json() == KINDS["bpe"].to_json()
    assert 257 < BPETokenizer.train(TRAINING_TEXTS, vocab_size=50257).vocab_size < 400
    assert BPETokenizer.train(TRAINING_TEXTS, vocab_size=257).vocab_size == 257
    with pytest.raises(ValueError, match=r"257 .* to 1048576 tokens"):
        BPETokenizer.train(TRAINING_TEXTS, vocab_size=256)


# ------------------------------------------------------------------------------------------- other people's tokenizers


def foreign(eos: str = EOS_TOKEN, special: bool = True, normalizer=None, without: str = "") -> tokenizers.Tokenizer:
    alphabet = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol not in without]
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["    "])
    backend.add_tokens([tokenizers.AddedToken(eos, special=special, normalized=False)])
    if normalizer:
        backend.normalizer = normalizer
    return backend


def test_settings_of_others_that_would_lose_text_are_put_off():
    backend = foreign()
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, 257)])
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_id=257)
    tokenizer = BPETokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("    four spaces")) == "    four spaces"
    assert tokenizer.vocab_size == 258 and len(tokenizer.encode("    four")) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalizer": normalizers.NFC()}, "changes text"),
        ({"without": "ô"}, "changes text"),
        ({"eos": "</s>"}, "no special token"),
        ({"special": False}, "no special token"),
    ],
)
def test_inexact_tokenizers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        BPETokenizer(foreign(**options))


def test_bad_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="There is no tokenizer"):
        load_tokenizer(tmp_path)
    for content, words in [("{", "is not JSON"), ("{}", "not a tokenizer"), ('{"type": "other"}', "not a tokenizer")]:
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_tokenizer(path)
    words = tokenizers.Tokenizer(models.WordLevel({"whole words": 0, EOS_TOKEN: 1}))
    words.save(str(path))
    with pytest.raises(ValueError, match="not byte-level"):
        load_tokenizer(path)


# ----------------------------------------------------------------------------------------------------- names of the Hub


def test_hub_name_is_fetched_unless_a_file_or_folder_has_it(tmp_path, monkeypatch):
    foreign().save(str(tmp_path / "fetched.json"))
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / "fetched.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("gpt2").vocab_size == load_tokenizer("owner/some-name_1.5").vocab_size == 258
    assert asked == [("gpt2", "tokenizer.json"), ("owner/some-name_1.5", "tokenizer.json")]
    (tmp_path / "gpt2").mkdir()
    KINDS["bytes"].save(tmp_path / "gpt2")
    assert load_tokenizer("gpt2").vocab_size == 257 and len(asked) == 2
    for path in ("missing.json", "a/b/c", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="There is no tokenizer"):
            load_tokenizer(path)
    assert len(asked) == 2


def test_unreachable_hub_is_a_sentence(monkeypatch):
    def download(name, file):
        raise huggingface_hub.errors.LocalEntryNotFoundError("three\nlines of\nadvice")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="no tokenizer gpt2 here, and the Hub can't be reached") as caught:
        load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)
