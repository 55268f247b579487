"""How autoregressive protein models write a protein, and what they want to be told before it.

| format   | a protein                                  | told by                                              |
|----------|--------------------------------------------|------------------------------------------------------|
| plain    | `<bos>` SEQ `<eos>`, one token a residue   | the tokenizer's bos and eos                          |
| progen2  | `1` SEQ `2`                                | model_type progen                                    |
| iglm     | `[HEAVY]` `[HUMAN]` SEQ `[SEP]`            | its tokens; `chain=` and `species=` of the header    |
| zymctrl  | EC `<sep>` `<start>` SEQ `<end>`           | its tokens; `EC=` of the header                      |
| protgpt2 | `<|endoftext|>`, lines of 60 residues, `<|endoftext|>`; byte-pair tokens of several residues       |

Sources: the models' cards on Hugging Face, ProGen2's `sample.py`, IgLM's `model/IgLM.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from turboesm_cli.errors import InputError, ModelError
from turboesm_cli.models.alphabet import AMINO_ACIDS, Alphabet
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.sequences.residues import SPELLED, slices
from turboesm_cli.sequences.tags import tag, where

NO_TOKEN = -1
"""Padding of vocabularies that need not have any."""

LINE = 60
"""Residues of a line of ProtGPT2's text."""


@dataclass(frozen=True, eq=False)
class Plain(Alphabet):
    """A start, a token for each residue, an end."""

    form: str = "plain"

    @cached_property
    def sampled(self) -> tuple[int, ...]:
        """Tokens that sampling may give: residues and the end."""
        letters = {token for token, text in enumerate(self.vocabulary) if len(text) == 1 and text.isupper()}
        return tuple(sorted(letters - self._silent | {self.end}))

    def described(self) -> dict[str, Any]:
        """What a bundle keeps."""
        return {"form": self.form, "name": self.family, "vocabulary": list(self.vocabulary),
                "start": self.start, "end": self.end}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Iglm(Plain):
    """IgLM's chain and species before the residues."""

    form: str = "iglm"
    takes: ClassVar[tuple[str, ...]] = ("chain", "species")

    def front(self, protein: Protein) -> list[int]:
        """Chain and species, from the header."""
        return [self._tagged(protein, "chain", _CHAINS), self._tagged(protein, "species", self._species)]

    def tags(self, protein: Protein) -> str:
        """Chain and species."""
        chain, species = (self.vocabulary[token][1:-1] for token in self.front(protein))
        return f"chain={chain} species={species}"

    def _tagged(self, protein: Protein, name: str, known: Iterable[str]) -> int:
        value = tag(protein, name)
        choice = " or ".join(sorted(known))
        if value is None:
            raise InputError(
                f"{where(protein)}{self.family} is told the {name} of each protein, {name}={choice}, in the "
                f"header or by --tags '{name}=...'"
            )
        if value.upper() not in known:
            raise InputError(f"{where(protein)}{name}={value} is unknown to {self.family}; give {choice}")
        return self.vocabulary.index(f"[{value.upper()}]")

    @cached_property
    def _species(self) -> frozenset[str]:
        named = {text[1:-1] for text in self.vocabulary if re.fullmatch(r"\[[A-Z]+\]", text)}
        return frozenset(named - {*_CHAINS, "PAD", "UNK", "CLS", "SEP", "MASK"})

    @cached_property
    def _silent(self) -> frozenset[int]:
        controls = (token for token, text in enumerate(self.vocabulary) if text.startswith("["))
        return frozenset({self.padding, *controls})


_CHAINS = ("HEAVY", "LIGHT")
_LETTERS = frozenset(AMINO_ACIDS + "XBUZO")


@dataclass(frozen=True, eq=False)
class Tokenized(Plain):
    """A format that needs the model's own tokenizer; `tokenizer` is its tokenizer.json."""

    tokenizer: str = ""

    def described(self) -> dict[str, Any]:
        """What a bundle keeps."""
        return super().described() | {"tokenizer": self.tokenizer}

    def _encode(self, text: str) -> list[int]:
        found: list[int] = _tokenizer(self.tokenizer).encode(text, add_special_tokens=False).ids
        return found


@dataclass(frozen=True, eq=False)
class Zymctrl(Tokenized):
    """ZymCTRL's EC number before the residues."""

    form: str = "zymctrl"
    takes: ClassVar[tuple[str, ...]] = ("EC",)

    def front(self, protein: Protein) -> list[int]:
        """EC number, `<sep>` and `<start>`."""
        ends = [self.vocabulary.index(text) for text in ("<sep>", "<start>")]
        return [*self._encode(self._number(protein)), *ends]

    def tags(self, protein: Protein) -> str:
        """EC number."""
        return f"EC={self._number(protein)}"

    def _number(self, protein: Protein) -> str:
        number = tag(protein, "EC")
        if number is None or not re.fullmatch(r"\d+(\.(\d+|n\d+|-)){1,3}", number):
            raise InputError(
                f"{where(protein)}{self.family} is told each enzyme's number, EC=1.1.1.1, in the header or "
                "by --tags 'EC=...'"
            )
        return number

    @cached_property
    def _silent(self) -> frozenset[int]:
        others = (token for token, text in enumerate(self.vocabulary) if len(text) > 1 or not text.isupper())
        return frozenset({self.padding, *others})


@dataclass(frozen=True, eq=False)
class Protgpt2(Tokenized):
    """ProtGPT2's text: tokens of several residues, which the text around them decides."""

    form: str = "protgpt2"

    def front(self, protein: Protein) -> list[int]:
        """`<|endoftext|>` and the end of its line."""
        return [self.start, self._newline]

    def tokenize(self, protein: Protein) -> list[int]:
        """Ids of the text: lines of 60."""
        return [*self.prompt(protein), self._newline, self.end]

    def length(self, protein: Protein) -> int:
        """Tokens of a whole protein."""
        return len(self.tokenize(protein))

    def prompt_length(self, protein: Protein, residues: int | None = None) -> int:
        """Tokens up to the last one that ends within the first `residues` residues."""
        whole = self.tokenize(protein)
        if residues is None:
            return len(whole) - 2
        seen, taken = 0, 2
        for token in whole[2:-2]:
            seen += len(self.detokenize([token]))
            if seen > residues:
                break
            taken += 1
        return taken

    @cached_property
    def sampled(self) -> tuple[int, ...]:
        """Tokens that sampling may give: all."""
        return tuple(range(len(self.vocabulary)))

    def detokenize(self, ids: Iterable[int]) -> str:
        """Residues of ids."""
        kept = [token for token in ids if token not in self._silent and token >= 0]
        text: str = _tokenizer(self.tokenizer).decode(kept, skip_special_tokens=False)
        return "".join(text.split())

    def unknown(self, sequence: str) -> str | None:
        """The first of its letters that is no amino acid's: byte-pair tokens can spell anything."""
        return next((text for text in SPELLED.findall(sequence) if text not in _LETTERS), None)

    @cached_property
    def _newline(self) -> int:
        return self._encode("\n")[0]

    def _body(self, protein: Protein, sequence: str) -> list[int]:
        letter = self.unknown(sequence)
        if letter is not None:
            raise InputError(f"{where(protein)}{letter!r} is no token of {self.family}; {self._instead}")
        return self._encode("\n".join(slices(sequence, LINE))) if sequence else []


@lru_cache(maxsize=4)
def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # it raises nothing narrower
        raise ModelError(f"a tokenizer.json cannot be read ({str(error)[:200]}); download it again") from error


FORMS: dict[str, type[Plain]] = {
    "plain": Plain, "progen2": Plain, "iglm": Iglm, "zymctrl": Zymctrl, "protgpt2": Protgpt2,
}  # fmt: skip


def decoder_alphabet(
    family: str, name: str, vocabulary: tuple[str, ...], special: dict[str, str], tokenizer: str
) -> Plain:
    """The alphabet of a model of `family` whose tokens are these; `special`: its bos_token and eos_token.

    `tokenizer` is its tokenizer.json, or "". Raises ModelError where it is not known how it writes proteins.
    """
    there = set(vocabulary)
    if {"[SEP]", "[HEAVY]", "[LIGHT]"} <= there:
        return Iglm(name, vocabulary, vocabulary.index("[HEAVY]"), NO_TOKEN, vocabulary.index("[SEP]"))
    if {"<sep>", "<start>", "<end>"} <= there and tokenizer:
        ends = vocabulary.index("<start>"), NO_TOKEN, vocabulary.index("<end>")
        return Zymctrl(name, vocabulary, *ends, tokenizer=tokenizer)
    if family == "progen" and {"1", "2"} <= there:
        ends = vocabulary.index("1"), NO_TOKEN, vocabulary.index("2")
        return Plain(name, vocabulary, *ends, form="progen2")
    if {"<|endoftext|>", "\u010a"} <= there and tokenizer and set(AMINO_ACIDS) <= there:
        end = vocabulary.index("<|endoftext|>")
        return Protgpt2(name, vocabulary, end, NO_TOKEN, end, tokenizer=tokenizer)
    ends_of = [special.get(which, "") for which in ("bos_token", "eos_token")]
    if set(ends_of) <= there and ends_of[0] != ends_of[1] and set(AMINO_ACIDS) <= there:
        found = Plain(name, vocabulary, vocabulary.index(ends_of[0]), NO_TOKEN, vocabulary.index(ends_of[1]))
        if not tokenizer or _one_each(tokenizer, found):
            return found
    raise ModelError(
        f"{name}: turboesm does not know how this model writes a protein; it reads models of one token a residue "
        "between <bos> and <eos>, ProGen2, IgLM, ZymCTRL and ProtGPT2"
    )


def _one_each(tokenizer: str, alphabet: Plain) -> bool:
    """Whether the tokenizer, too, gives each residue the token of its letter."""
    found = _tokenizer(tokenizer).encode(AMINO_ACIDS, add_special_tokens=False).ids
    return tuple(found) == alphabet.residues


def alphabet_from(described: dict[str, Any]) -> Plain:
    """The inverse of `Plain.described`. Raises LookupError, TypeError or ValueError for anything else."""
    form, vocabulary = described["form"], described["vocabulary"]
    start, end = described["start"], described["end"]
    if not isinstance(vocabulary, list) or not all(isinstance(text, str) for text in vocabulary):
        raise ValueError("a vocabulary that is no list of text")
    if not all(type(token) is int and 0 <= token < len(vocabulary) for token in (start, end)):
        raise ValueError("a start or an end that is no token")
    name, kind = str(described["name"]), FORMS[form]
    if issubclass(kind, Tokenized):
        return kind(
            name, tuple(vocabulary), start, NO_TOKEN, end, form=form, tokenizer=str(described["tokenizer"])
        )
    return kind(name, tuple(vocabulary), start, NO_TOKEN, end, form=form)
