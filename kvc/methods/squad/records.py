"""What is noted of each answer."""

from collections.abc import Sequence
from typing import Any

from kvc.core.module import Record
from kvc.methods.squad.answers import Answers, texts
from kvc.methods.squad.assembly import IGNORED
from kvc.methods.squad.reading import Reading, Tokens


def graded(
    questions: Sequence[Any],
    tokenizer: Any,
    answers: Answers,
    reading: Reading,
    tail: Tokens,
    read_seconds: float,
    row_bytes: float,
) -> list[Record]:
    """The record of each answer of a batch.

    Args:
        questions: The `SquadQuestion` of each row.
        tokenizer: Decodes.
        answers: To all of them.
        reading: What was read before.
        tail: What was read after it.
        read_seconds: Time that reading took, for the batch.
        row_bytes: Bytes of one row of the KV cache in all layers.

    Returns:
        `completion`, `answer` (as it is scored), `em`, `f1`, `new_tokens`; rows of KV per layer and head:
        `kv_tokens_context` stand for the context, `kv_tokens_final` are held at the end, both also in bytes; seconds
        in all, for reading (`compress_seconds`), the first token and the others, each the row's share of the batch.
    """
    shares = {
        "compress_seconds": read_seconds / len(questions),
        "prefill_seconds": answers.prefill_seconds / len(questions),
        "decode_seconds": answers.decode_seconds / len(questions),
    }
    seconds = {"seconds": sum(shares.values()), **shares}
    new = (answers.ids != IGNORED).sum(1)
    # No forward sees the last token.
    final = (reading.head + reading.counts + tail.lengths + new - 1).tolist()
    records: list[Record] = []
    for row, text in enumerate(texts(tokenizer, answers.ids)):
        found = questions[row].score(text)
        rows = {"context": int(reading.counts[row]), "final": int(final[row])}
        records.append(
            {
                "completion": text,
                "answer": found.text,
                "em": found.em,
                "f1": found.f1,
                "new_tokens": int(new[row]),
                **{f"kv_tokens_{name}": count for name, count in rows.items()},
                **{f"kv_bytes_{name}": count * row_bytes for name, count in rows.items()},
                **seconds,
            }
        )
    return records
