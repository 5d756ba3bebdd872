"""From a batch to what the losses look at: nothing is worked out that no term needs.

Shapes: B batch, L answer tokens.
"""

from typing import Any, Protocol

import torch

from kvc.methods.squad.assembly import IGNORED
from kvc.methods.squad.losses import Evidence, Mix, OnPolicyKd, Predicted
from kvc.methods.squad.losses.contrastive import slot_means
from kvc.methods.squad.losses.generation import mixed_answers, until_first_error
from kvc.methods.squad.losses.geometry import alignment, slot_cosine, uniformity
from kvc.methods.squad.reading import Reading, Tokens
from kvc.methods.squad.scale import relative_rms

Batch = dict[str, Any]


class Student(Protocol):
    """A model that reads slots."""

    def read(self, batch: Batch) -> Reading:
        """Compress the contexts, with gradient."""
        ...

    def predict(self, reading: Reading, batch: Batch, answer: Tokens) -> Predicted:
        """Predict answers behind the questions."""
        ...

    def say(self, batch: Batch, sample: bool = False) -> torch.Tensor:
        """Answers of its own, `[B, L]` with -100 for padding, decoded in eval mode without gradient."""
        ...

    def taught(self, batch: Batch, answer: Tokens) -> torch.Tensor:
        """Logits of the teacher for the answers."""
        ...

    def rewards(self, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
        """F1 of answers `[B, L]`, `[B]`."""
        ...


def look(student: Student, mix: Mix, batch: Batch) -> tuple[Evidence, Predicted]:
    """The evidence of a batch, and the predictions of the gold answers.

    Args:
        student: Who is trained.
        mix: The terms.
        batch: See `kvc.data.squad.Squad`.
    """
    needs, gold = mix.needs, Tokens.of(batch, "answer")
    evidence = Evidence(group=batch["group"] if "group" in needs else None)
    said: torch.Tensor | None = None
    if "advantage" in needs:
        said, greedy = student.say(batch, sample=True), student.say(batch)
        evidence.advantage = student.rewards(batch, said) - student.rewards(batch, greedy)
    elif {"own", "agreed"} & needs:
        said = student.say(batch)
    reading = student.read(batch)
    predicted = student.predict(reading, batch, gold)
    evidence.gold = predicted
    if "gold.teacher" in needs:
        predicted.teacher = student.taught(batch, gold)
    if reading.slots is not None:
        evidence.slots, evidence.slot_mask = reading.slots.slots, reading.slots.mask
        evidence.reference = reading.reference
    if "agreed" in needs and said is not None:
        evidence.agreed = until_first_error(gold.labels, said)[gold.labels != IGNORED]
    if "own" in needs and said is not None:
        policy = next((term for term in mix.terms if isinstance(term, OnPolicyKd)), None)
        if policy is not None:
            # From the global state, which checkpoints keep.
            draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            said, _ = mixed_answers(gold.labels, said, policy.gold_share, draw)
        own = Tokens.labelled(said)
        evidence.own = student.predict(reading, batch, own)
        if "own.teacher" in needs:
            evidence.own.teacher = student.taught(batch, own)
    return evidence, predicted


@torch.no_grad()
def geometry(evidence: Evidence, rms: float) -> dict[str, torch.Tensor]:
    """What shows a collapse or a wrong scale of the slots, to be logged."""
    slots, mask = evidence.slots, evidence.slot_mask
    if slots is None or mask is None:
        return {}
    found = {"slot_cosine": slot_cosine(slots, mask), "slot_rms": relative_rms(slots, mask, rms)}
    if evidence.reference is not None and len(slots) > 1:
        means = slot_means(slots.float(), mask)
        found |= {"uniformity": uniformity(means), "alignment": alignment(means, evidence.reference)}
    return found
