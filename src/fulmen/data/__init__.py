"""Text in, packed batches out: sources, tokenizer, chat layout, packing and the loader (docs/data.md)."""

from fulmen.data.chat import encode_chat, render_chat
from fulmen.data.documents import Corpus, Document
from fulmen.data.loader import PackedLoader, held_out_batches
from fulmen.data.packing import Batch
from fulmen.data.sources import read_documents, sample_texts, split
from fulmen.data.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "PackedLoader",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "held_out_batches",
    "read_documents",
    "render_chat",
    "sample_texts",
    "split",
]
