"""Scores for other programs: CSV (one question of one arm a line) and JSON (arms with intervals)."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from kvc.scoring.cells import Cell

HEADER = ["cell", "file", "arm", "id", "question", "gold", "samples", "correct", "majority_answer", "answers"]


def as_csv(cells: Sequence[Cell]) -> str:
    """Every question with its extracted answers; the columns after `answers` are its scores."""
    rows = [(cell, arm, path, graded) for cell in cells for arm, all_ in cell.graded.items() for path, graded in all_]
    metrics = list(dict.fromkeys(name for *_, graded in rows for name in graded.scores))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*HEADER, *metrics])
    for cell, arm, path, graded in rows:
        sampled = graded.sampled
        facts = [cell.label, str(path), arm, *sampled.key, sampled.gold, len(graded.answers), sum(graded.correct)]
        answers = json.dumps(graded.answers, ensure_ascii=False)
        table.writerow([*facts, graded.vote, answers, *(graded.scores.get(name) for name in metrics)])
    return text.getvalue()


def as_json(cells: Sequence[Cell], ks: Sequence[int]) -> dict[str, Any]:
    """Every arm of every cell, and the paired differences of its method from the others."""
    return {"schema": 1, "kind": "score", "k": list(ks), "cells": [_cell(cell) for cell in cells]}


def _cell(cell: Cell) -> dict[str, Any]:
    differences = {arm: cell.differences(arm) for arm in cell.others}
    metrics = dict.fromkeys(name for values in differences.values() for name in values)
    return {
        "label": cell.label,
        "settings": cell.settings,
        "files": [str(path) for path in cell.files],
        "arms": {arm: {name: v.as_dict() for name, v in cell.values(arm).items()} for arm in cell.graded},
        "differences": {
            name: {arm: values[name].as_dict() for arm, values in differences.items() if name in values}
            for name in metrics
        },
        "method": cell.method,
    }
