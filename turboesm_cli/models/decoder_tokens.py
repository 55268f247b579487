"""The tokens of an autoregressive model's folder: tokenizer.json, or vocab.txt, one token a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turboesm_cli.errors import ModelError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.decoder_alphabets import decoder_alphabet
from turboesm_cli.models.esm_config import read_json, read_text
from turboesm_cli.models.unreadable import one_line

LARGEST = 16 << 20
"""Bytes of a tokenizer.json: that of GPT-2 has two million."""

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")


def read_alphabet(folder: Path, family: str, name: str, rows: int) -> Alphabet:
    """The tokens beside a model's weights; `rows` of its embedding. Raises ModelError."""
    fast, plain = folder / "tokenizer.json", folder / "vocab.txt"
    if fast.exists():
        text = read_text(fast, LARGEST)
        vocabulary = _vocabulary(fast, rows)
        return decoder_alphabet(family, name, vocabulary, _special(folder), text)
    if not plain.exists() and (folder.parent / "vocab.txt").exists():
        plain = folder.parent / "vocab.txt"  # as in IgLM's package
    if plain.exists():
        lines = read_text(plain, LARGEST).splitlines()
        return decoder_alphabet(family, name, _filled(dict(enumerate(lines)), rows, plain), _special(folder), "")
    raise ModelError(f"{folder} has neither tokenizer.json nor vocab.txt; copy the model's tokenizer there")


def _vocabulary(path: Path, rows: int) -> tuple[str, ...]:
    """Each token's text, by id."""
    from tokenizers import Tokenizer

    try:
        found: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # it raises nothing narrower
        raise ModelError(f"{path} is no tokenizer ({one_line(error)}); download it again") from error
    return _filled({token: text for text, token in found.items()}, rows, path)


def _filled(texts: dict[int, str], rows: int, path: Path) -> tuple[str, ...]:
    """Texts of all rows of the embedding: some of them may have no token."""
    beyond = [token for token in texts if not 0 <= token < rows]
    if beyond:
        raise ModelError(f"{path} has token {beyond[0]}, the model's embedding {rows} rows: not of one model")
    return tuple(texts.get(token, f"<unused_{token}>") for token in range(rows))


def _special(folder: Path) -> dict[str, str]:
    """bos_token and eos_token, as the tokenizer's settings name them."""
    found: dict[str, str] = {}
    for name in _SETTINGS:
        settings: Any = read_json(folder / name) if (folder / name).exists() else {}
        for which in ("bos_token", "eos_token"):
            value = settings.get(which) if isinstance(settings, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[which] = value
    return found
