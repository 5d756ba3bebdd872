"""Documents of facts and questions about all of them, as files: `python -m kvc.data.synthetic.study_files FOLDER`.

`documents.jsonl` has a `text` on each line, `questions.jsonl` an `id`, a `question` and its `answer`, one for each
fact. The tiny model answers them with the documents before it.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from kvc.core.files import write_text
from kvc.core.seeds import DEFAULT_SEED
from kvc.data.synthetic.passages import sample_facts

Row = dict[str, str]


def study_files(seed: int = DEFAULT_SEED, documents: int = 6, facts: int = 6) -> tuple[list[Row], list[Row]]:
    """Draw documents that share no fact, and a question about each fact.

    Args:
        seed: Of the draws.
        documents: How many.
        facts: In each.

    Returns:
        Rows of `documents.jsonl` and of `questions.jsonl`.
    """
    # Text as a key: other users of the same seed draw other facts.
    rng = random.Random(f"study {seed}")
    known = sample_facts(rng, documents * facts)
    statements = [rng.choice(relation.statements).format(e=entity, v=value) for entity, value, relation in known]
    texts = [" ".join(statements[start : start + facts]) for start in range(0, len(statements), facts)]
    asked = [
        {"id": f"{seed}-{number}", "question": rng.choice(relation.questions).format(e=entity), "answer": value}
        for number, (entity, value, relation) in enumerate(known)
    ]
    return [{"text": text} for text in texts], asked


def main(argv: list[str]) -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m kvc.data.synthetic.study_files",
        description="Write documents of synthetic facts, and questions about all of them.",
        epilog="example: python -m kvc.data.synthetic.study_files facts --documents 6 --facts 6",
    )
    parser.add_argument("folder", type=Path, help="folder to write to; files of the same names are replaced")
    parser.add_argument("--documents", type=int, default=6, help="number of documents (default: 6)")
    parser.add_argument("--facts", type=int, default=6, help="facts in each (default: 6)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the draws (default: 42)")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("documents", "questions"), study_files(options.seed, options.documents, options.facts)):
        write_text(options.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
