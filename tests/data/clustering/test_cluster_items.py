"""Questions from records of every known form, and what is wrong with others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from word_problems import rows, write

from kvc.data.clustering import items as module
from kvc.data.clustering.items import Item, load_items
from kvc.errors import UserError


@pytest.mark.parametrize(
    ("record", "item"),
    [
        ({"question": "q", "solution": "first\nthen", "answer": 16}, Item("q", "first\nthen", "16")),
        ({"problem": "p", "reasoning": "r", "solution": "s"}, Item("p", "r", "s")),
        ({"problem": "p", "reasoning": "r", "answer": "a"}, Item("p", "r", "a")),
        ({"question": "q", "answer": "2 + 3 = 5\n#### 5"}, Item("q", "2 + 3 = 5", "5")),
        (
            {"problem": "p", "solution": "So \\boxed{\\frac{1}{2}}."},
            Item("p", "So \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ),
        ({"problem": "p", "answer": "033"}, Item("p", "", "033")),
        ({"problem": "p", "answer": "one\ntwo"}, Item("p", "one\ntwo", "")),
        ({"question": " q ", "answer": None}, Item("q", "", "")),
    ],
)
def test_forms_of_records(record: dict[str, Any], item: Item) -> None:
    assert module.item_from_record("here", record) == item


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "a"}\n{"text": "b"}\n', "line 2: has none of the keys question, problem"),
        ('{"question": "a"}\n\n{"question": "  "}\n', "line 3: key 'question' is empty"),
        ('{"question": ["a"]}\n', "line 1: key 'question' must be text, got list"),
        ('{"question": "a", "answer": true}\n', "line 1: key 'answer' must be text, got bool"),
        ("", "holds no records"),
        ('{"question": \n', "line 1: not valid JSON"),
        ('[{"problem": "a"}, 3]', "record 2: expected an object, got int"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_items(str(path))
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def records(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append((name, split))
        yield from ((f"hub:{name} record {i}", row) for i, row in enumerate(rows(1), start=1) if split == "train")

    monkeypatch.setattr(module, "hub_records", records)
    assert [item.solution for item in load_items("hub:GAIR/LIMO")] == ["0", "0", "0"]
    with pytest.raises(UserError, match="hub:GAIR/LIMO: split 'test' holds no records"):
        load_items("hub:GAIR/LIMO", "test")
    assert asked == [("GAIR/LIMO", "train"), ("GAIR/LIMO", "test")]


def test_files(tmp_path: Path) -> None:
    assert len(load_items(write(tmp_path / "questions.jsonl"))) == 24
