"""A document as tokens that remember which segment they came from."""

from typing import Any, NamedTuple

from kvc.data.synthetic.base import Document, Kind, document_text


class Tokens(NamedTuple):
    """The tokens of a document, without special tokens around it.

    Attributes:
        ids: Token ids.
        ends: For each token, the number of characters up to and with its last one.
        kinds: For each token, the kind of the segment that holds its last character.
    """

    ids: list[int]
    ends: list[int]
    kinds: list[Kind]


def tokenize(tokenizer: Any, document: Document) -> Tokens:
    """Tokenise the whole text at once, so that tokens are those a model would read.

    Args:
        tokenizer: A fast tokenizer (offsets are needed).
        document: Segments; a token that spans two belongs to the later one.
    """
    encoded = tokenizer(document_text(document), add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    kinds: list[Kind] = []
    current, last = 0, len(document[0].text)
    for end in ends:
        while last < end:
            current += 1
            last += len(document[current].text)
        kinds.append(document[current].kind)
    return Tokens(list(encoded["input_ids"]), ends, kinds)
