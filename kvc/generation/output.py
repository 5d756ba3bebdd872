"""What a call of generate returns."""

from dataclasses import dataclass
from typing import Literal

from kvc.cache.accounting import Usage
from kvc.cache.memory import KVMemory

Finish = Literal["eos", "stop", "length"]


@dataclass
class Output:
    """Answers of a batch; lists have one entry a row.

    Attributes:
        tokens: New token ids, the one that ended the answer included.
        finish: What ended the answer: an end token, a stop string or the limit.
        prompt_tokens: Tokens of the prompt, padding not counted.
        compressions: How often the row's memory shrank, the compression of the prompt included.
        usage: Tokens and bytes of memory over time.
        memory: What is left of the memory; rows that were dropped at their end are gone.
        prefill_seconds: Time until the first logits, for the batch as a whole.
        decode_seconds: Time from then on.
        texts: Decoded answers without special tokens, up to the stop string; None without a tokenizer.
    """

    tokens: list[list[int]]
    finish: list[Finish]
    prompt_tokens: list[int]
    compressions: list[int]
    usage: Usage
    memory: KVMemory
    prefill_seconds: float
    decode_seconds: float
    texts: list[str] | None = None
