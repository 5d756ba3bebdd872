"""The journal of paid replies: cut at every byte, damaged, foreign, in use."""

import json
import os
from pathlib import Path

import pytest

from kvc.data.annotate.base import Gold
from kvc.data.annotate.chat.journal import Journal
from kvc.data.annotate.chat.outcome import Outcome
from kvc.data.annotate.chat.pool import key_of, make_pool
from kvc.errors import UserError

SETTINGS = {"model": "m", "temperature": 0.3}
OUTCOMES = [
    Outcome("a", "valid", "1 + 1 = 2 <COMP>\n#### 2", (), 1, 10, 5),
    Outcome("b", "rejected", "na\u00efve \u2028 text", ("no_marker",), 2, 10, 5, False),
    Outcome("c", "failed", reasons=("http_500",), requests=8, message="down"),
]


def written(path: Path, outcomes: list[Outcome] = OUTCOMES) -> Path:
    with Journal(path, SETTINGS) as journal:
        for outcome in outcomes:
            journal.append(outcome)
    return path


def test_everything_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path / "deep" / "j")
    with Journal(path, SETTINGS) as journal:
        assert journal.outcomes == OUTCOMES
    assert path.read_bytes().count(b"\n") == 4


def test_nothing_is_created_before_the_first_outcome(tmp_path: Path) -> None:
    with Journal(tmp_path / "deep" / "j", SETTINGS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_each_outcome_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr("os.write", lambda file, data: calls.append("write") or write(file, data))
    monkeypatch.setattr("os.fsync", lambda file: calls.append("sync") or sync(file))
    with Journal(tmp_path / "j", SETTINGS) as journal:
        for outcome in OUTCOMES[:2]:
            journal.append(outcome)
            assert calls[-2:] == ["write", "sync"]
    assert calls == ["sync", "write", "sync", "write", "sync"]  # the first is that of the folder


def test_a_cut_at_any_byte_loses_one_line_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    whole = written(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = max(0, whole[:size].count(b"\n") - 1)
        with Journal(path, SETTINGS) as journal:
            assert journal.outcomes == OUTCOMES[:complete], size
            for outcome in OUTCOMES[complete:]:
                journal.append(outcome)
        assert path.read_bytes() == whole, size


def test_a_last_line_of_rubbish_is_dropped_and_one_within_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n")
    with Journal(path, SETTINGS) as journal:
        assert journal.outcomes == OUTCOMES
    assert path.read_bytes() == whole
    lines = whole.split(b"\n")
    lines[2] = lines[2][:-9]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"j line 3: is damaged"):
        Journal(path, SETTINGS)


@pytest.mark.parametrize("line", ["[]", "3", '{"key": "a"}', '{"key": "a", "status": "fine", "reasons": []}'])
def test_a_line_that_is_no_outcome_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "j")
    path.write_text(path.read_text().replace("\n", f"\n{line}\n", 1))
    with pytest.raises(UserError, match="line 2: is damaged"):
        Journal(path, SETTINGS)


@pytest.mark.parametrize("content", ["mine", "mine\n", '{"question": "q"}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "j"
    path.write_text(content)
    with pytest.raises(UserError, match="is no journal"):
        Journal(path, SETTINGS)
    assert path.read_text() == content


def test_other_settings_name_the_key(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    with pytest.raises(UserError, match=r"another temperature \(0.3, now 0.5\)"):
        Journal(path, {**SETTINGS, "temperature": 0.5})
    with pytest.raises(UserError, match=r"another seed \(None, now 1\)"):
        Journal(path, {**SETTINGS, "seed": 1})


def test_overwrite_waits_for_the_first_outcome(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    before = path.read_bytes()
    with Journal(path, {"model": "n"}, overwrite=True) as journal:
        assert journal.outcomes == []
        assert path.read_bytes() == before
        journal.append(OUTCOMES[1])
    with Journal(path, {"model": "n"}) as journal:
        assert journal.outcomes == OUTCOMES[1:2]


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    with Journal(path, SETTINGS), pytest.raises(UserError, match="another process is writing"):
        Journal(path, SETTINGS)
    one, two = Journal(tmp_path / "new", SETTINGS), Journal(tmp_path / "new", SETTINGS)
    one.append(OUTCOMES[0])
    with pytest.raises(UserError, match="another process"):
        two.append(OUTCOMES[1])
    one.close()
    assert len((tmp_path / "new").read_text().splitlines()) == 2


def test_a_full_disk_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "j")

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Journal(path, SETTINGS) as journal:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(UserError, match="No space left on device"):
            journal.append(OUTCOMES[0])


def gold(number: int, answer: str = "1") -> Gold:
    return Gold(f"question {number}", answer, "", "s")


def test_the_pool_has_each_checkable_question_once() -> None:
    pool = make_pool([gold(1), gold(2), gold(1, "7"), gold(3, "blue"), gold(4)], seed=1)
    assert (len(pool.items), pool.repeated, pool.unusable) == (3, 1, 1)
    assert {item.key for item in pool.items} == {key_of(f"question {i}") for i in (1, 2, 4)}


def test_the_order_of_the_pool_depends_on_the_seed_alone() -> None:
    golds = [gold(i) for i in range(40)]
    order = make_pool(golds, 1).items
    assert make_pool(golds[::-1], 1) == make_pool(golds, 1)
    assert make_pool(golds, 2).items != order
    assert make_pool(golds, 2).identity == make_pool(golds, 1).identity
    assert [item.gold for item in order] != golds
    fewer = {item.key for item in make_pool(golds[:20], 1).items}
    assert [item for item in order if item.key in fewer] == list(make_pool(golds[:20], 1).items)
    changed = [gold(0, "2"), *golds[1:]]
    assert make_pool(changed, 1).identity != make_pool(golds, 1).identity


def test_keys_are_stable() -> None:
    assert key_of(" What is 1 + 1?\n") == key_of("What is 1 + 1?") == "f9f244e3d4f2199b"
    assert json.dumps(Outcome("a", "valid").record()).startswith('{"key": "a", "status": "valid", "text": ""')
