"""Learning curves from the TensorBoard event files of runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvc.report.folder import Finished

VALIDATION, TRAINING = "val/", "train/"
Curve = list[tuple[int, float]]


@dataclass
class Curves:
    """What the events of several runs say.

    Attributes:
        tags: Metric to label of a run to its (step, value) pairs, by step.
        missing: One sentence for each run that has no curve.
    """

    tags: dict[str, dict[str, Curve]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_curves(runs: Sequence[Finished]) -> Curves:
    """Validation metrics of every run over the steps of training; of the training itself where no run has any."""
    scalars, curves = {}, Curves()
    for run in runs:
        try:
            scalars[run.label] = read_scalars(run.training)
        except (OSError, ValueError) as error:
            curves.missing.append(f"{run.label}: {error}")
    for kind in (VALIDATION, TRAINING):
        for label, tags in scalars.items():
            for tag, curve in tags.items():
                if tag.startswith(kind):
                    curves.tags.setdefault(tag, {})[label] = curve
        if curves.tags:
            break
    drawn = {label for lines in curves.tags.values() for label in lines}
    curves.missing += [f"{label}: its events hold no metric of a training" for label in scalars.keys() - drawn]
    curves.missing.sort()
    return curves


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar of the event files in a folder, by tag.

    Where a resumed run repeats a step, what it wrote last counts.

    Raises:
        ValueError: If there are no event files, or they are broken.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("*.tfevents.*")):
        raise ValueError("no TensorBoard events")
    # Everything but scalars is skipped; 0 keeps all of them.
    keep = {"scalars": 0, "images": 1, "tensors": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
    accumulator = EventAccumulator(str(folder), size_guidance=keep)
    try:
        accumulator.Reload()
    except Exception as error:  # the reader's own errors have no common base
        raise ValueError("its TensorBoard events are broken") from error
    found = {}
    for tag in accumulator.Tags()["scalars"]:
        values = {event.step: event.value for event in accumulator.Scalars(tag) if math.isfinite(event.value)}
        if values:
            found[tag] = sorted(values.items())
    return found
