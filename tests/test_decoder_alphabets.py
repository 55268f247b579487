"""How each kind of autoregressive model writes a protein: round trips, tags, refusals, and what a bundle keeps."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboesm_cli.errors import InputError, ModelError
from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder_alphabets import Plain, alphabet_from, decoder_alphabet
from turboesm_cli.models.decoder_tokens import read_alphabet
from turboesm_cli.sequences.fasta import Protein

tokenizers = pytest.importorskip("tokenizers")

LETTERS = tuple(AMINO_ACIDS)
TAGS = {
    "iglm": "chain=heavy species=Human",
    "zymctrl": "lysozyme EC=3.2.1.17",
    "protgpt2": "",
    "plain": "",
    "progen2": "",
}
IGLM = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "[HEAVY]", "[LIGHT]", "[HUMAN]", "[MOUSE]")
PROGEN2 = ("<|pad|>", "<|bos|>", "<|eos|>", "1", "2", *LETTERS, "X")
PLAIN = ("<pad>", "<bos>", "<eos>", *LETTERS, "X")
ZYMCTRL = ("<pad>", "<sep>", "<start>", "<end>", *"0123456789.-n", *LETTERS, "<|endoftext|>")
FORMS = list(TAGS)


def word_level(vocabulary: tuple[str, ...]) -> str:
    """A tokenizer.json that takes one letter at a time, tokens in <> as they are."""
    words = {text: token for token, text in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=vocabulary[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.add_special_tokens([text for text in vocabulary if len(text) > 1])
    text: str = made.to_str()
    return text


@cache
def byte_pairs() -> str:
    """A tokenizer.json of byte pairs as ProtGPT2's, trained on a few proteins."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(
        ["MKTAYIAKQRQISFVKSHFSRQ\nLEERLGLIEVQ", "MKTAYLEERLGKQRQ\n", AMINO_ACIDS] * 4, trainer
    )
    text: str = made.to_str()
    return text


@cache
def alphabet_of(form: str) -> Plain:
    if form == "iglm":
        return decoder_alphabet("gpt2", "IgLM", IGLM, {}, "")
    if form == "progen2":
        return decoder_alphabet("progen", "progen2-small", PROGEN2, {}, word_level(PROGEN2))
    if form == "zymctrl":
        return decoder_alphabet("gpt2", "ZymCTRL", ZYMCTRL, {}, word_level(ZYMCTRL))
    if form == "protgpt2":
        found = tokenizers.Tokenizer.from_str(byte_pairs()).get_vocab()
        return decoder_alphabet("gpt2", "ProtGPT2", tuple(sorted(found, key=found.__getitem__)), {}, byte_pairs())
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return decoder_alphabet("llama", "plain", PLAIN, special, word_level(PLAIN))


def protein(form: str, sequence: str) -> Protein:
    return Protein("p1", TAGS[form], sequence, "x.fasta", 3)


def texts(form: str, ids: list[int]) -> list[str]:
    return [alphabet_of(form).vocabulary[token] for token in ids]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_told_by_its_tokens(form: str) -> None:
    assert alphabet_of(form).form == form


def test_each_form_writes_a_protein_as_its_authors_do() -> None:
    written = {form: texts(form, alphabet_of(form).tokenize(protein(form, "MKV"))) for form in FORMS}
    assert written["plain"] == ["<bos>", "M", "K", "V", "<eos>"]
    assert written["progen2"] == ["1", "M", "K", "V", "2"]
    assert written["iglm"] == ["[HEAVY]", "[HUMAN]", "M", "K", "V", "[SEP]"]
    assert written["zymctrl"] == [*"3.2.1.17", "<sep>", "<start>", "M", "K", "V", "<end>"]
    assert written["protgpt2"][:2] == ["<|endoftext|>", "\u010a"]
    assert written["protgpt2"][-2:] == ["\u010a", "<|endoftext|>"] and "".join(written["protgpt2"][2:-2]) == "MKV"


@pytest.mark.parametrize("form", FORMS)
@given(sequence=st.text(AMINO_ACIDS, max_size=190))
@settings(max_examples=40)
def test_detokenize_is_the_inverse(form: str, sequence: str) -> None:
    alphabet, item = alphabet_of(form), protein(form, sequence)
    ids = alphabet.tokenize(item)
    assert alphabet.detokenize(ids) == alphabet.detokenize([*ids, alphabet.padding]) == sequence
    assert alphabet.length(item) == len(ids)
    assert ids[: len(alphabet.front(item))] == alphabet.front(item) and ids[-1] == alphabet.end
    assert alphabet.batch([item]).tolist() == [ids]


@pytest.mark.parametrize("form", FORMS)
@given(sequence=st.text(AMINO_ACIDS, min_size=1, max_size=150), residues=st.integers(0, 160))
@settings(max_examples=40)
def test_a_prompt_is_the_start_of_the_protein(form: str, sequence: str, residues: int) -> None:
    alphabet, item = alphabet_of(form), protein(form, sequence)
    whole, front = alphabet.tokenize(item), len(alphabet.front(item))
    cached = alphabet.prompt_length(item, residues)
    assert front <= cached <= alphabet.prompt_length(item) < len(whole)
    kept = alphabet.detokenize(whole[:cached])
    assert sequence.startswith(kept) and len(kept) <= residues
    if form != "protgpt2":  # whose tokens are of several residues
        assert len(kept) == min(residues, len(sequence))
        assert alphabet.prompt(item, residues) == whole[:cached]
    assert alphabet.prompt(item) == whole[: alphabet.prompt_length(item)]


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_keeps_all_of_it(form: str) -> None:
    alphabet = alphabet_of(form)
    back = alphabet_from(json.loads(json.dumps(alphabet.described())))
    item = protein(form, "MKTAYIAKQRQISFVKSHFSRQ" * 4)
    assert type(back) is type(alphabet) and back.described() == alphabet.described()
    assert back.tokenize(item) == alphabet.tokenize(item) and back.sampled == alphabet.sampled
    assert back.tags(item) == alphabet.tags(item) and len(back) == len(alphabet)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        {"form": "other"}, {"form": None}, {"vocabulary": None}, {"vocabulary": [1, 2]}, {"vocabulary": []},
        {"start": -1}, {"start": 10**6}, {"end": "2"}, {"end": True}, {"start": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_bundles_damaged_tokens_are_refused(form: str, change: dict[str, Any]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        alphabet_from(alphabet_of(form).described() | change)


@pytest.mark.parametrize("form", ["iglm", "zymctrl"])
def test_tags_give_the_same_front_again(form: str) -> None:
    alphabet, item = alphabet_of(form), protein(form, "MKV")
    assert alphabet.front(Protein("other", alphabet.tags(item), "W")) == alphabet.front(item)
    assert alphabet.tags(Protein("other", alphabet.tags(item), "W")) == alphabet.tags(item)


@pytest.mark.parametrize(
    ("form", "header", "reason"),
    [
        ("iglm", "", r"p1.*chain of each protein, chain=HEAVY or LIGHT"),
        ("iglm", "chain=heavy", r"p1.*species of each protein, species=HUMAN or MOUSE"),
        ("iglm", "species=human", r"p1.*chain"),
        ("iglm", "chain=heavy species=dog", r"record 3 \(p1\), line \d+: species=dog is unknown.*HUMAN or MOUSE"),
        ("iglm", "chain=both species=human", r"record 3 \(p1\), line \d+: chain=both is unknown"),
        ("iglm", "chain=heavy species=mask", r"record 3 \(p1\), line \d+: species=mask is unknown"),
        ("iglm", "mychain=heavy species=human", r"p1.*chain"),
        ("zymctrl", "", r"p1.*EC=1\.1\.1\.1"),
        ("zymctrl", "EC=", r"p1.*EC=1\.1\.1\.1"),
        ("zymctrl", "EC=lysozyme", r"p1.*EC=1\.1\.1\.1"),
        ("zymctrl", "EC=3", r"p1.*EC=1\.1\.1\.1"),
        ("zymctrl", "EC=3.2.1.17.5", r"p1.*EC=1\.1\.1\.1"),
    ],
)
def test_a_missing_tag_is_named_with_its_record(form: str, header: str, reason: str) -> None:
    alphabet, item = alphabet_of(form), Protein("p1", header, "MKV", "x.fasta", 3)
    for ask in (alphabet.tokenize, alphabet.length, alphabet.prompt, alphabet.tags):
        with pytest.raises(InputError, match=reason) as caught:
            ask(item)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", ["EC=3.2.1.17", "enzyme ec:3.2.1.17; of hens", "a EC = 3.2.1.17, b"])
def test_tags_are_found_as_headers_write_them(header: str) -> None:
    assert alphabet_of("zymctrl").tags(Protein("p", header, "M")) == "EC=3.2.1.17"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sequence", ["MJK", "MKa", "M<mask>K", "MK-", "M.K", "M1K", "M K", "M\n"])
def test_what_is_no_token_is_refused(form: str, sequence: str) -> None:
    with pytest.raises(InputError, match=r"record 3 \(p1\).* is no token of"):
        alphabet_of(form).tokenize(protein(form, sequence))


def test_x_is_offered_where_there_is_one() -> None:
    with pytest.raises(InputError, match="write X for an unknown residue"):
        alphabet_of("plain").tokenize(protein("plain", "MJ"))
    with pytest.raises(InputError, match="remove the record"):
        alphabet_of("iglm").tokenize(protein("iglm", "MX"))


def test_residues_and_the_end_are_sampled_and_nothing_else() -> None:
    for form in ("plain", "progen2", "iglm", "zymctrl"):
        alphabet = alphabet_of(form)
        assert alphabet.end in alphabet.sampled and alphabet.start not in alphabet.sampled
        letters = {alphabet.vocabulary[token] for token in alphabet.sampled if token != alphabet.end}
        assert set(AMINO_ACIDS) <= letters <= {*AMINO_ACIDS, "X"}
        assert alphabet.detokenize(alphabet.residues) == AMINO_ACIDS


@pytest.mark.parametrize(
    ("family", "vocabulary", "special"),
    [
        ("llama", ("<bos>", "<eos>", *LETTERS[1:]), {"bos_token": "<bos>", "eos_token": "<eos>"}),
        ("llama", ("<bos>", "<eos>", *LETTERS), {}),
        ("llama", ("<bos>", "<eos>", *LETTERS), {"bos_token": "<bos>", "eos_token": "<bos>"}),
        ("llama", ("<bos>", "<eos>", *LETTERS), {"bos_token": "<s>", "eos_token": "<eos>"}),
        ("gpt2", ("1", "2", *LETTERS), {}),
        ("gpt2", ("<sep>", "<start>", "<end>", *LETTERS), {}),  # without its tokenizer
    ],
)
def test_unknown_ways_to_write_a_protein_are_refused(
    family: str, vocabulary: tuple[str, ...], special: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match="does not know how this model writes a protein"):
        decoder_alphabet(family, "m", vocabulary, special, "")


def test_a_tokenizer_that_joins_residues_is_not_taken_for_one_token_each() -> None:
    found = tokenizers.Tokenizer.from_str(byte_pairs())
    found.add_special_tokens(["<bos>", "<eos>"])
    vocabulary = tuple(sorted(found.get_vocab(), key=found.get_vocab().__getitem__))
    vocabulary = tuple("<gone>" if text == "<|endoftext|>" else text for text in vocabulary)
    with pytest.raises(ModelError, match="does not know how"):
        decoder_alphabet("gpt2", "m", vocabulary, {"bos_token": "<bos>", "eos_token": "<eos>"}, found.to_str())


def test_tokens_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.txt"):
        read_alphabet(tmp_path, "gpt2", "m", 40)
    (tmp_path / "vocab.txt").write_text("\n".join(IGLM) + "\n")
    found = read_alphabet(tmp_path, "gpt2", "m", 40)
    assert found.vocabulary[: len(IGLM)] == IGLM and found.vocabulary[-1] == "<unused_39>" and len(found) == 40
    (tmp_path / "inner").mkdir()
    assert read_alphabet(tmp_path / "inner", "gpt2", "m", 40).vocabulary == found.vocabulary  # as IgLM's package
    with pytest.raises(ModelError, match="has token 20, the model's embedding 20 rows"):
        read_alphabet(tmp_path, "gpt2", "m", 20)
    for text in ("", "{}", "[1", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer") as caught:
            read_alphabet(tmp_path, "gpt2", "m", 40)
        assert "\n" not in str(caught.value)
