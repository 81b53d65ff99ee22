"""Cards that are written again: what a person wrote into one stays, above a marker."""

from __future__ import annotations

from huggingface_hub.repocard import REGEX_YAML_BLOCK

CARD = "README.md"
MARKER = "<!-- What stands above this line is kept when hf_zipit writes the card again. -->"
OURS = "library_name: hf_zipit"


def kept_above(card: str, earlier: str) -> str:
    """A new card with what stands in an earlier one above the marker.

    Where that has no marker, all of its text is somebody else's and kept, unless an earlier version of this library
    wrote it. Its metadata are replaced.
    """
    header = REGEX_YAML_BLOCK.search(earlier)
    own = earlier[header.end() :] if header else earlier
    if MARKER in own:
        own = own.partition(MARKER)[0]
    elif header and OURS in header.group(2):
        return card
    return card.replace(MARKER, f"{own.strip()}\n\n{MARKER}", 1) if own.strip() else card
