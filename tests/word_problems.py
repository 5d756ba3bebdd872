"""Word problems of three topics that share no telling word, for tests of clusters."""

import json
from pathlib import Path

TOPICS = {
    "eggs": "A farmer has {n} chickens that lay {m} eggs a day. How many dozen eggs do the chickens lay in {n} days?",
    "cars": "A car drives {n} miles at a speed of {m} miles per hour. For how long does the driver travel?",
    "books": "Each library book has {n} pages. A student reads {m} pages of the book. Which pages are left to read?",
}
NAMES = tuple(TOPICS)


def rows(each: int = 8) -> list[dict[str, str]]:
    """Records of LIMO's form, topics in turn; no two of a topic are equally far from the others."""
    return [
        {
            "question": f"{TOPICS[name].format(n=10 + i, m=30 + i)} {' '.join(f'{name}{j}' for j in range(i))}",
            "solution": f"Let me think about the {name} of {i}.\nSo it is {i}.",
            "answer": str(i),
        }
        for i in range(each)
        for name in NAMES
    ]


def write(path: Path, records: list[dict[str, str]] | None = None) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows() if records is None else records)))
    return str(path)
