"""ROUGE of free text, which torchmetrics computes."""

from typing import NamedTuple

from torchmetrics.functional.text import rouge_score

from kvc.errors import UserError


class Rouge(NamedTuple):
    """Overlap of one answer with the right one, each the harmonic mean of precision and recall, 0 to 1.

    Attributes:
        text: The answer as it is scored.
        rouge1: Of words.
        rouge2: Of pairs of words.
        rouge_l: Of the longest common subsequence.
    """

    text: str
    rouge1: float
    rouge2: float
    rouge_l: float


def rouge(prediction: str, gold: str, stemmer: bool = False) -> Rouge:
    """Score one answer.

    Args:
        prediction: The answer.
        gold: The right one.
        stemmer: Compare stems of words.

    Raises:
        UserError: If a stemmer is asked for and not installed.
    """
    keys = ("rouge1", "rouge2", "rougeL")
    try:
        found = rouge_score(prediction, gold, rouge_keys=keys, use_stemmer=stemmer)
    except ModuleNotFoundError as error:
        raise UserError("data.stemmer: true needs the package nltk: pip install nltk") from error
    return Rouge(prediction, *(float(found[f"{key}_fmeasure"]) for key in keys))
