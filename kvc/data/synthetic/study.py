r"""Study, then ask: several documents are read, and afterwards a question about one of them is answered.

The documents are passages that share no entity for the same relation, so a question belongs to one of them without
naming it. As a conversation the assistant reads them between `<think>` and `</think>`; in the plain layout they
follow each other.

Examples (the first is shown whole; of the others the first lines):

    Document 1: Emma lives in Paris. The home of Karl is in Rome.
    Document 2: The pet of Noah is a cat. Tina lives in Oslo.
    Question: Where does Tina live?
    Answer: Oslo

    Document 1: The bell is painted red. ...      Document 1: The sport of Ida is golf. Ruth is 34 years old. ...
    Document 2: The lamp is painted blue. ...     Document 2: Sam likes golf. ...
"""

import random

from kvc.data.synthetic.base import Document, Segment
from kvc.data.synthetic.example import END_THINK, EOS, THINK, Example, Turn, reply, text_chunks, user
from kvc.data.synthetic.passages import sample_facts

INSTRUCTION = "Study these documents and learn what they say."
DONE = "Learning has completed."


def sample_study(
    rng: random.Random,
    documents: tuple[int, int] = (2, 6),
    facts: tuple[int, int] = (2, 8),
    questions: tuple[int, int] = (1, 4),
) -> Example:
    """Draw documents and questions about them; a chunk per document.

    Args:
        rng: Source of randomness.
        documents: Smallest and largest number of documents (inclusive).
        facts: Smallest and largest number of facts in each (inclusive).
        questions: Smallest and largest number of questions; never more than there are facts.
    """
    sizes = [rng.randint(*facts) for _ in range(rng.randint(*documents))]
    known = sample_facts(rng, sum(sizes))
    statements = [rng.choice(relation.statements).format(e=entity, v=value) for entity, value, relation in known]
    texts = []
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        texts.append(f"Document {number + 1}: {' '.join(statements[start : start + size])}\n")
    turns, answers = [], []
    asked = rng.sample(known, min(len(known), rng.randint(*questions)))
    for number, (entity, value, relation) in enumerate(asked):
        question = rng.choice(relation.questions).format(e=entity)
        query = f"{chr(10) if number else ''}Question: {question}"
        turns.append(Turn(query, "\nAnswer:", (Segment(f" {value}", "answer"),)))
        answers.append(value)
    return Example("", text_chunks(*texts), tuple(turns), answers[0])


def study_chat(example: Example) -> Document:
    """The conversation: the instruction, the documents between the thinking tags, then a message per question."""
    document: Document = [user(INSTRUCTION), Segment(f"{THINK}\n", "context")]
    document += [segment for chunk in example.chunks for segment in chunk]
    document += [Segment(f"{END_THINK}\n{DONE}{EOS}\n", "context")]
    for turn in example.turns:
        document += [user(turn.query), *reply(turn)]
    return document
