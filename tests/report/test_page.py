import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_runs import make_run, twelve, write_records

from kvc.__main__ import main


class Reader(HTMLParser):
    """Collects the tables of a page by id, and everything that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str]]]] = {}
        self.sources: list[str] = []
        self.scripts = 0
        self.events: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[tuple[str, str]]] | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.scripts += tag == "script"
        self.events += [name for name in given if name.startswith("on")]
        self.sources += [str(given[key]) for key in ("src", "href", "xlink:href", "action") if given.get(key)]
        if tag == "table":
            self.rows = self.tables.setdefault(str(given["id"]), [])
        elif tag == "tr" and self.rows is not None:
            self.rows.append([])
        elif tag in ("td", "th") and self.rows is not None:
            self.rows[-1].append(("", given.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.rows and self.rows[-1]:
            text, look = self.rows[-1][-1]
            self.rows[-1][-1] = (f"{text} {data.strip()}".strip(), look)

    def column(self, table: str, name: str) -> dict[str, tuple[str, str]]:
        """First cell of each line (without its symbol) to text and class of one column."""
        head, *lines = self.tables[table]
        index = [text for text, _ in head].index(name)
        return {line[0][0].split()[-1]: line[index] for line in lines}

    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def compare(tmp_path: Path, runs: list[Any], *options: str) -> Reader:
    page = tmp_path / "out" / "report.html"
    assert main(["compare", *map(str, runs), "--html", str(page), *options]) == 0
    return read(page)


def test_twelve_runs(tmp_path: Path) -> None:
    page = compare(tmp_path, twelve(tmp_path / "runs"))
    rows = page.column("results", "exact_match")
    assert len(page.tables["results"]) == 1 + 12 * 3
    assert rows["b448-s43"] == ("0.843 [0.823, 0.863]", "number best")
    assert [run for run, (_, look) in rows.items() if "best" in look] == ["b448-s43"]
    assert page.column("results", "kv_bytes_peak")["b8-s42"] == ("16,384 [15,484, 17,284]", "number best")
    assert page.column("results", "perplexity")["b8-s42"][1] == "number extra"
    head = [text for text, _ in page.tables["results"][0]]
    assert head == ["run", "exact_match", "kv_bytes_peak", "method", "n", "seed", "trained", "fit s", "perplexity"]

    differences = page.column("differences", "exact_match - full_kv")
    assert differences["b8-s42"] == ("-0.708 [-0.728, -0.688] *", "number worse")
    assert page.column("differences", "exact_match - no_context")["b8-s42"][1] == "number better"
    assert page.column("settings", "budget")["b256-s43"] == ("256", "")
    assert [text for text, _ in page.tables["settings"][0]] == ["run", "seed_everything", "budget"]
    assert page.column("seeds", "runs").keys() >= {"more", "full_kv"}
    assert len(page.tables["seeds"]) == 1 + 6 * 3

    said = page.said()
    for sentence in (
        "On the Pareto front: b8-s43; b32-s43; b128-s43; b256-s43; b384-s43; b448-s43; b8-s42, full_kv.",
        "kv_bytes_peak (bytes), less is better",
        "optimiser step",
        "Sample 7",
        "finished",
        "0123456789 with changes",
        "kvc 0.1.0 · torch 2.13.0",
    ):
        assert sentence in said, sentence
    assert "Sample 8" not in said


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = compare(tmp_path, [make_run(tmp_path / "a")])
    assert [source for source in page.sources if not source.startswith(("#", "data:image/png;base64,"))] == []
    assert any(source.startswith("data:") for source in page.sources)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in text


EVIL = "<img src=x onerror=alert(1)>\"'&"


def test_everything_is_escaped(tmp_path: Path) -> None:
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 5}
    folder = make_run(
        tmp_path / "runs" / "<b>&a",
        method=f"x.{EVIL}",
        headline=None,
        metrics={EVIL: number, "kv_bytes": {"value": 5.0}},
        arms={EVIL: {EVIL: number, "kv_bytes": {"value": 9.0}}},
        differences={EVIL: {EVIL: number}},
        pictures=[EVIL, "../../../config.yaml"],
        versions={EVIL: EVIL, "torch": EVIL},
        git={"commit": EVIL},
        machine={"gpus": [EVIL]},
        data={"hash": EVIL},
        config={EVIL: EVIL},
    )
    write_records(folder, [{"id": EVIL, "task": EVIL, "prompt": EVIL, "gold": EVIL, "completion": EVIL * 40}])
    page = compare(tmp_path, [folder, make_run(tmp_path / "runs" / "b")], "--title", EVIL)
    assert page.scripts == 1
    assert page.events == []
    assert not [source for source in page.sources if source.startswith("x")]
    assert EVIL in page.said()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in text
    assert "config.yaml is missing, or no PNG" in page.said()


def test_sections_say_what_is_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bare", arms=None, differences=None, pictures=None, versions=None, config=None)
    for path in (*folder.glob("*.tfevents.*"), folder / "eval" / "test" / "predictions.jsonl"):
        path.unlink()
    page = compare(tmp_path, [folder], "--x", "fit_seconds", "--metric", "kv_bytes_peak")
    said = page.said()
    for sentence in (
        "The runs have no metric to set against a cost.",
        "No run has a learning curve. bare: no TensorBoard events",
        "There is only one run.",
        "No sample can be shown. bare: there is no predictions.jsonl",
    ):
        assert sentence in said, sentence
    assert "Paired differences" not in said
    assert "Pictures of the runs" not in said


def test_warnings_and_runs_without_the_cost(tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", data={"hash": "e"}, metrics={"exact_match": {"value": 0.4}}, arms=None)
    page = compare(tmp_path, [make_run(tmp_path / "a"), other])
    assert "the runs used different data (2 hashes)" in page.said()
    assert "Without kv_bytes_peak: other." in page.said()
    assert page.column("results", "kv_bytes_peak")["other"] == ("-", "number")


@pytest.mark.parametrize("length", [400, 500])
def test_long_texts_are_folded(tmp_path: Path, length: int) -> None:
    folder = make_run(tmp_path / "a")
    write_records(folder, [{"id": 1, "completion": "w" * length, "correct": False}])
    compare(tmp_path, [folder])
    text = (tmp_path / "out" / "report.html").read_text()
    assert ('class="long"' in text) == (length > 420)
    assert "w" * length in text
    assert "✗ wrong" in text


def test_scored_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    scored = {"text": "1+1=2 then", "ends": [5, 10], "scores": [0.9, 0.2], "labels": [1, 0]}
    write_records(folder, [{"id": 0, **scored}])
    compare(tmp_path, [folder])
    text = (tmp_path / "out" / "report.html").read_text()
    assert '<span class="shade-4">1+1=2</span><span class="gold">▾</span><span class="shade-1"> then</span>' in text


def test_settings_are_lines_where_there_are_many(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, config={"model": {"init_args": {f"key{i}": f"{name}{i}" for i in range(6)}}})
        for name in "ab"
    ]
    page = compare(tmp_path, runs)
    assert [text for text, _ in page.tables["settings"][0]] == ["setting", "a", "b"]
    assert page.column("settings", "b")["model.init_args.key5"] == ("b5", "")
