"""Where a protein can be looked up, by its accession alone."""

from __future__ import annotations

import re

# https://www.uniprot.org/help/accession_numbers; a number of an isoform may follow.
_UNIPROT = re.compile(r"([OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9]([A-Z][A-Z0-9]{2}[0-9]){1,2})(-[0-9]{1,3})?")


def uniprot_address(accession: str) -> str:
    """The address of a protein in UniProt, "" where the text is no accession of it."""
    found = _UNIPROT.fullmatch(accession)
    return f"https://www.uniprot.org/uniprotkb/{found[1]}/entry" if found else ""
