"""The byte-level BPE tokenizer: trained here or read from any byte-level `tokenizer.json`, saved for other software."""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fulmen.config import UserError

# minimax-01.md section 11.
BOS = "<beginning_of_sentence>"
EOS = "<end_of_sentence>"
IMAGE = "<image>"
SPECIAL_TOKENS = (BOS, EOS, IMAGE)

# No merge crosses the borders of these: a word with the one mark or space before it, up to three digits, punctuation,
# line ends, and a run of spaces, the last of which goes to the word after it: ` return` is one token at any depth.
PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"[\r\n]+",
        r"[^\S\r\n]+(?!\S)",
        r"[^\S\r\n]+",
    )
)


def _byte_of_symbol() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (the convention of GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes in their order for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Tokenizer:
    """Text to token ids and back. Immutable, and safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """backend: any byte-level BPE of the `tokenizers` library, with or without fulmen's special tokens.

        Raises UserError if it is not byte-level BPE.
        """
        symbols = _byte_of_symbol()
        if not isinstance(backend.model, models.BPE) or any(backend.token_to_id(s) is None for s in symbols):
            raise UserError("the tokenizer is not byte-level BPE, the only kind that fulmen reads: choose another")
        # Two instances, because whether special strings are parsed is a setting of the whole object in the library.
        self._parsing = backend
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._parsing.encode_special_tokens = False
        self._plain.encode_special_tokens = True
        self._token_bytes = self._spell(symbols)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges from these texts.

        The ids are the 256 bytes, then the merges, then bos, eos and image as the last three of exactly `vocab_size`.
        Raises UserError if vocab_size has no room for bytes and special tokens or the texts hold too few merges for it.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size = {vocab_size} has no room for 256 bytes and the special tokens: >= {smallest}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(map(_without_special_strings, texts), trainer)
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
        reached = backend.get_vocab_size()
        if reached != vocab_size:
            raise UserError(
                f"the corpus is too small for vocab_size = {vocab_size}: its merges end at {reached}; "
                f"ask for at most {reached} or give more text"
            )
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a directory. Raises UserError if it is missing or not byte-level BPE."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"there is no tokenizer at {file}: name a directory with a tokenizer.json, or the file itself"
            )
        try:
            return cls(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        # The library raises nothing narrower than Exception.
        except Exception as error:
            raise UserError(f"{file} is not a readable tokenizer ({error}): get or save it again") from error

    def save(self, directory: str | os.PathLike) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, each whole or not at all, for `transformers` too."""
        folder = Path(directory)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.bos_id is not None and self.eos_id is not None:
            config |= {"bos_token": BOS, "eos_token": EOS, "chat_template": chat_template()}
        _write_atomically(folder / "tokenizer.json", self._parsing.to_str(pretty=True))
        _write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; no bos or eos is added.

        With `special` the strings of special tokens become these tokens; without, they are text like any other, so that
        nobody's text can forge a token. Raises UserError for a lone surrogate, which no UTF-8 text can hold.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        backend = self._parsing if special else self._plain
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _check_encodable(text)
            raise

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._parsing.decode(ids, skip_special_tokens=skip_special)

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return len(self._token_bytes)

    @property
    def bos_id(self) -> int | None:
        """The id of `<beginning_of_sentence>`; None in a tokenizer of another family."""
        return self._special_id(BOS)

    @property
    def eos_id(self) -> int | None:
        """The id of `<end_of_sentence>`; None in a tokenizer of another family."""
        return self._special_id(EOS)

    @property
    def image_id(self) -> int | None:
        """The id of `<image>`; None in a tokenizer without it."""
        return self._special_id(IMAGE)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token writes; none for a special token, or an id that a padded model has beyond the last."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def byte_lengths(self) -> torch.Tensor:
        """The number of bytes that each token writes, [V] int64; 0 for special tokens."""
        return torch.tensor([len(token) for token in self._token_bytes], dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the vocabulary: equal for two tokenizers that give every id the same meaning."""
        return hashlib.blake2b(repr(sorted(self._parsing.get_vocab().items())).encode(), digest_size=8).hexdigest()

    def _special_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def _spell(self, symbols: dict[str, int]) -> list[bytes]:
        """The bytes of every token by id; gaps in the ids are empty."""
        vocabulary = self._parsing.get_vocab()
        spelled = [b""] * (max(vocabulary.values()) + 1)
        added = self._parsing.get_added_tokens_decoder()
        for token, token_id in vocabulary.items():
            if token_id in added:
                spelled[token_id] = b"" if added[token_id].special else token.encode()
            else:
                spelled[token_id] = bytes(symbols[symbol] for symbol in token)
        return spelled


class StreamDecoder:
    """Turns ids into text one at a time. Bytes of an unfinished character are held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; may be empty. Special tokens write nothing."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD since it will not be completed; the decoder is as new after it."""
        return self._decoder.decode(b"", final=True)


def chat_template() -> str:
    """The chat layout as a Jinja template, for `transformers` and other software."""
    return files("fulmen.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _without_special_strings(text: str) -> str:
    # In rendered chats these strings are tokens of their own, so no merges are spent on their letters.
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate ({text[error.start]!a}) at character {error.start}: "
            "it was not read as UTF-8, convert it first"
        ) from None


def _write_atomically(path: Path, text: str) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another directory") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
