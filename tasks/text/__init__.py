"""Language modelling on real text: documents -> tokens -> packed windows -> bits per byte."""

from tasks.text.corpus import Corpus, Document, load_corpus, split_documents
from tasks.text.packing import PackedDataset
from tasks.text.task import TextTask
from tasks.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "PackedDataset",
    "TextTask",
    "Tokenizer",
    "load_corpus",
    "load_tokenizer",
    "split_documents",
]
