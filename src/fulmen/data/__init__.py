"""Text and images in, packed batches out: sources, tokenizer, chat layout, packing and the loader (docs/data.md)."""

from fulmen.data.chat import encode_chat, expand_images, images_of, render_chat
from fulmen.data.documents import Corpus, Document, PreferencePair
from fulmen.data.image_files import ImageLimits, open_image
from fulmen.data.images import ImageLayout, ImageProcessor, PlacedImage, ProcessedImage
from fulmen.data.loader import PackedLoader, held_out_batches
from fulmen.data.packing import Batch
from fulmen.data.preferences import read_preferences
from fulmen.data.sources import read_documents, sample_texts, split
from fulmen.data.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "ImageLayout",
    "ImageLimits",
    "ImageProcessor",
    "PackedLoader",
    "PlacedImage",
    "PreferencePair",
    "ProcessedImage",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "expand_images",
    "held_out_batches",
    "images_of",
    "open_image",
    "read_documents",
    "read_preferences",
    "render_chat",
    "sample_texts",
    "split",
]
