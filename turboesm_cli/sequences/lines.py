"""A line of sequence, as people write it → its residues, or why it is none; see the table in `sequences`.

Cleaning has limits, for prose is made of the letters of proteins: blanks only between groups of 10 letters, as
GenBank and UniProt write them, in all lines of a record alike; numbers only at a line's edges, and only those that
count residues.
"""

from __future__ import annotations

import re
import string
from enum import StrEnum

from turboesm_cli.sequences.residues import MASK_TEXT, count
from turboesm_cli.sequences.sources import PIECE, Piece

GROUP = 10  # letters between blanks
SHOWN = 40  # letters of a line that a message shows
MARKS = "\ufeff\x1a"  # a byte-order mark, and the end of a file of DOS: what files that are joined leave at a seam


class Mend(StrEnum):
    """What was mended in a record; the keys of `ReadReport.mended`."""

    LOWER_CASE = "lower-case letters upper-cased"
    BLANKS = "blanks or digits dropped"
    GAPS = "gaps dropped"
    STOP = "final stop '*' dropped"
    DOT = "final stop '.' dropped"
    J = "J read as X"
    UNNAMED = "empty header named by its record number"
    CONTROL = "control characters in the header replaced by spaces"
    INVISIBLE = "invisible characters in the header dropped"
    LONG_HEADER = "long header shortened"
    DUPLICATE = "duplicate identifier renamed"
    TRUNCATED = "long sequence truncated"
    SEAM = "a '>' inside a line read as the next record's header"
    MARK = "byte-order mark or DOS end-of-file mark dropped"
    ATOMS = "no SEQRES: residues read from the atoms"


class NotSequence(Exception):
    """Why a line cannot be sequence."""


_MENDABLE = {
    Mend.LOWER_CASE: frozenset(string.ascii_lowercase),
    Mend.BLANKS: frozenset(" \t\v\f" + string.digits),
    Mend.GAPS: frozenset("-"),
    Mend.J: frozenset("Jj"),
}
_KNOWN = frozenset(string.ascii_uppercase + "*.").union(*_MENDABLE.values())
_MENDED = str.maketrans(
    string.ascii_lowercase + "J", string.ascii_uppercase.replace("J", "X") + "X", " \t\v\f-" + string.digits
)
_ONLY_RESIDUES = re.compile("[A-IK-Z]*").fullmatch  # every letter but J is a token of ESM-2
_DIGIT = re.compile("[0-9]").search
_INNER = re.compile(r"\d|\S\s+\S").search
_NUMBERED = re.compile(r"\s*(?:(\d{1,9})\s+)?([^\d\s](?:.*[^\d\s])?)(?:\s+(\d{1,9}))?\s*", re.ASCII).fullmatch

_CODES = """
    Ala Arg Asn Asp Asx Cys Gln Glu Glx Gly His Ile Leu Lys Met Phe Pro Pyl Sec Ser Thr Trp Tyr Val Xaa
"""
_CODE = "(?:" + "|".join(_CODES.split()) + ")"
_THREE_LETTERS = re.compile(rf"(?:H-)?{_CODE}(?:[-\s]+{_CODE})+(?:-OH)?|{_CODE}{{4,}}", re.IGNORECASE).fullmatch
_MODIFIED = re.compile(
    r"(?:[a-z]?[A-Z]?[a-z]{1,6}|H)-[A-Z]+(?:-(?:OH|NH2?|[A-Z]?[a-z]{1,6}))?|[A-Z]+-(?:OH|NH2|[A-Z]?[a-z]{1,6})"
).fullmatch
_WORDS = """
    aborted denied done empty end eof error errors exception expired failed failure false fasta forbidden invalid
    killed missing nan nil none null refused retry sequence terminated timeout true unauthorized unavailable
    undefined unknown warning
"""
_KNOWN_WORDS = frozenset(_WORDS.split())
_LONGEST_WORD = 20
_UNUSUAL = frozenset("BJOUXZ")  # letters that hardly any protein has
_TITLE = re.compile("[A-Z][a-z]+").fullmatch


class Lines:
    """The lines of one record: what was read so far decides what may follow."""

    def __init__(self) -> None:
        self.residues = 0
        self.width = 0  # letters, gaps and stops counted
        self.widths: list[int] = []  # the same, line by line
        self.mends: dict[Mend, int] = {}  # → the line where each was needed first
        self._groups = 0  # in the first line; 0 where that is not in groups
        self._ended = False  # a line in groups was shorter than the first, which only the last one may be
        self._upper = True  # no lower case so far
        self._blank_end = False  # the last piece of a very long line ended in a blank

    def read(self, piece: Piece) -> str:
        """Return a line's residues, stops and dots. Raises NotSequence."""
        text = piece.text if piece.text[-1:] not in MARKS else self._unmarked(piece)
        if not text.strip():
            self._blank_end = bool(text) and piece.column > 1
            return ""
        if not (plain := _ONLY_RESIDUES(text)):
            self._require_known(piece, text)
        self._require_no_text(piece, text.strip())
        self._lay_out(piece, text)
        return text if plain else self._cleaned(piece, text)

    def _unmarked(self, piece: Piece) -> str:
        text = piece.text.rstrip(MARKS)
        if text != piece.text:
            self.mends.setdefault(Mend.MARK, piece.line)
        return text

    def _require_known(self, piece: Piece, text: str) -> None:
        # A <mask> counts as residues of the same length here, so that columns stay true.
        probe = text.replace(MASK_TEXT, "X" * len(MASK_TEXT))
        if set(probe) <= _KNOWN:
            return
        index = next(index for index, letter in enumerate(probe) if letter not in _KNOWN)
        raise NotSequence(f"unknown letter {probe[index]!r} at {place(piece, index)}")

    def _require_no_text(self, piece: Piece, text: str) -> None:
        if self._is_word(text):
            raise NotSequence(f"{_line(piece)} is {text!r}, which looks like a word")
        if len(text) > 5 and _THREE_LETTERS(text):
            raise NotSequence(f"three-letter codes at {place(piece, 0)}; write one letter per residue")
        if len(text) <= 60 and "-" in text and _MODIFIED(text):
            raise NotSequence(f"{_line(piece)} looks like a peptide with modified ends; write residues alone")

    def _is_word(self, text: str) -> bool:
        """Whether a line is no residues but a word; in upper case only where it does not go on from full lines."""
        if len(text) > _LONGEST_WORD:
            return False
        word = text.rstrip(".")
        if word.lower() not in _KNOWN_WORDS:
            return bool(self.widths) and self._upper and _TITLE(word) is not None
        wrapped = len(self.widths) > 0 and len(set(self.widths)) == 1 and len(text) <= self.widths[0]
        return not (wrapped and text.isupper() and _UNUSUAL.isdisjoint(text))

    def _lay_out(self, piece: Piece, text: str) -> None:
        """Check blanks and numbers, and that lines in groups are followed by such."""
        if piece.column > 1 or len(piece.text) >= PIECE:
            self._require_one_word(piece, text)
            self._add_width(piece, len(text.strip()))
            return
        groups = self._counted_groups(piece, text) if _INNER(text) else [text.strip()]
        if self._groups or len(groups) > 1:
            self._require_groups(piece, groups)
        self._add_width(piece, sum(map(len, groups)))

    def _require_one_word(self, piece: Piece, text: str) -> None:
        """A line of over 64 Ki letters is read in pieces, none of which may know of a blank."""
        apart = piece.column > 1 and (self._blank_end or text[0].isspace())
        self._blank_end = text[-1].isspace()
        if apart or _INNER(text) or self._groups:
            raise NotSequence(f"blanks or digits in {_line(piece)}, which is over {PIECE:,} letters long")

    def _add_width(self, piece: Piece, width: int) -> None:
        self.width += width
        if piece.column > 1 and self.widths:
            self.widths[-1] += width
        else:
            self.widths.append(width)

    def _counted_groups(self, piece: Piece, text: str) -> list[str]:
        """The groups of a line, its numbers taken off and checked."""
        found = _NUMBERED(text)
        inner = _DIGIT(text, found.start(2), found.end(2)) if found else _DIGIT(text)
        if found is None or inner:
            at = place(piece, inner.start() if inner else 0)
            raise NotSequence(f"digit at {at}; only numbers at a line's edges, set off by blanks, are dropped")
        groups = found[2].split()
        before, after = self.residues, self.residues + sum(count(_bare(group)) for group in groups)
        if int(found[1] or before + 1) != before + 1 or int(found[3] or after) != after:
            raise NotSequence(f"a number in {_line(piece)} that does not count residues")
        return groups

    def _require_groups(self, piece: Piece, groups: list[str]) -> None:
        sizes = [count(group.rstrip("*.")) for group in groups]
        even = set(sizes[:-1]) <= {GROUP} and sizes[-1] <= GROUP
        letters = "".join(groups).replace(MASK_TEXT, "")
        alike = letters.isupper() or letters.islower()
        if not even or not alike or self._ended or (self.widths and len(groups) > self._groups):
            shown = f"{' '.join(groups)[:SHOWN]!r}"
            raise NotSequence(f"{_line(piece)} is {shown}: blanks that do not part groups of {GROUP} in all lines")
        self._groups = self._groups or len(groups)
        self._ended = len(groups) < self._groups or sizes[-1] < GROUP

    def _cleaned(self, piece: Piece, text: str) -> str:
        letters = set(text.replace(MASK_TEXT, ""))
        for mend, mendable in _MENDABLE.items():
            if not letters.isdisjoint(mendable):
                self.mends.setdefault(mend, piece.line)
        self._upper = self._upper and letters.isdisjoint(string.ascii_lowercase)
        return MASK_TEXT.join(part.translate(_MENDED) for part in text.split(MASK_TEXT))


def place(piece: Piece, index: int) -> str:
    """Where a letter of a piece stands, in words; of a format that a parser read, which letter it is."""
    return f"{_line(piece)}, column {piece.column + index}" if piece.line else f"letter {piece.column + index}"


def _line(piece: Piece) -> str:
    return f"line {piece.line}" if piece.line else "the sequence"


def _bare(group: str) -> str:
    return re.sub(r"[-.*]", "", group)
