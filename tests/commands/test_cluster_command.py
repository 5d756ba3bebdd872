"""The command `cluster`: what it writes, reuses, refuses and prints."""

import hashlib
import json
from pathlib import Path

import pytest
from word_problems import rows, write

from kvc.__main__ import main
from kvc.commands.cluster import _name

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NEW = "How many eggs do the chickens of this farmer lay?"


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of what it holds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "farm.jsonl")
    return tmp_path


def test_cluster_then_search(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "farm.jsonl", "--k", "3"]) == 0
    folder = Path("clusters/farm")
    said = capsys.readouterr().out
    assert "24 questions" in said
    assert "k = 3: 8 to 8 questions a cluster" in said
    assert json.loads((folder / "clusters.json").read_text())["k"] == [3]

    before = contents(folder)
    search = ["cluster", "--output", str(folder), "--similar", NEW, "--neighbours", "4", "--save", "near.json"]
    assert main(search) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    assert len(lines) == 4
    assert all("chickens" in line for line in lines)
    assert "k = 3: cluster" in out
    saved = json.loads(Path("near.json").read_text())
    assert [set(document) for document in saved] == [{"problem", "reasoning", "solution"}] * 4
    assert saved[0]["problem"][:40] in lines[0]
    assert contents(folder) == before

    assert main(search) == 2
    assert "--save near.json: exists, add --overwrite to replace it" in capsys.readouterr().err
    assert main([*search, "--overwrite"]) == 0
    assert contents(folder) == before


def test_names_of_folders() -> None:
    assert _name("some/gsm8k.v2.jsonl") == "gsm8k.v2"
    assert _name("hub:GAIR/LIMO") == "LIMO"
    assert _name("hub:openai/gsm8k-1.5:main") == "gsm8k-1.5-main"


def test_finished_clusters_are_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cluster", "farm.jsonl", "--k", "3", "2", "--output", "out"]
    assert main(command) == 0
    before = contents(Path("out"))
    assert main([*command, "--similar", NEW]) == 0
    said = capsys.readouterr().out
    assert "out holds these clusters already" in said
    assert "k = 2: cluster" in said
    assert main([*command, "--seed", "7"]) == 2
    err = capsys.readouterr().err
    assert "--output out holds other clusters (embedder, seed differ)" in err
    assert len(err.splitlines()) == 1
    assert contents(Path("out")) == before
    write(Path("more.jsonl"), rows(9))
    assert main(["cluster", "more.jsonl", *command[2:]]) == 2
    assert "--output out holds other clusters (data_hash differ)" in capsys.readouterr().err
    assert contents(Path("out")) == before
    Path("more.jsonl").unlink()
    assert main([*command, "--seed", "7", "--overwrite"]) == 0
    assert json.loads(Path("out/clusters.json").read_text())["seed"] == 7
    assert sorted(path.name for path in place.iterdir()) == ["farm.jsonl", "out"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["farm.jsonl"], "--k 40: there are only 24 questions; give a smaller --k"),
        (["farm.jsonl", "--k", "0"], "--k"),
        (["farm.jsonl", "--k", "2", "2"], "--k 2 2: a number is given twice"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["empty.jsonl"], "empty.jsonl: holds no records"),
        (["keys.jsonl"], "keys.jsonl line 2: has none of the keys question, problem"),
        (["same.jsonl", "--k", "2"], "--k 2: there are only 3 questions, 1 of them different"),
        (["farm.jsonl", "--k", "2", "--output", "empty.jsonl"], "--output empty.jsonl: that is a file, not a folder"),
        (
            ["farm.jsonl", "--k", "2", "--output", "mine"],
            "--output mine: the folder is not empty and holds no clusters",
        ),
        (["farm.jsonl", "--k", "2", "--output", "mine", "--overwrite"], "--output mine: the folder is not empty"),
        (["farm.jsonl", "--k", "2", "--output", "empty.jsonl/out"], "cannot write"),
        (["farm.jsonl", "--k", "2", "--prompt", "query"], "--prompt needs --embeddings MODEL"),
        (["farm.jsonl", "--k", "2", "--embeddings", "x/y", "--dimensions", "3"], "--dimensions is for"),
        (["farm.jsonl", "--k", "2", "--save", "near.json"], "--save needs --similar QUESTION"),
        (["farm.jsonl", "--k", "2", "--neighbours", "3"], "--neighbours needs --similar QUESTION"),
        ([], "give QUESTIONS_FILE to cluster"),
        (["--similar", NEW], "--similar needs QUESTIONS_FILE or --output DIR"),
        (["--similar", NEW, "--output", "mine"], "mine holds no clusters"),
    ],
)
def test_bad_input(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("keys.jsonl").write_text('{"question": "a"}\n{"text": "b"}\n')
    write(Path("same.jsonl"), rows(1)[:1] * 3)
    Path("mine").mkdir()
    Path("mine/thing").write_text("mine")
    before = contents(place)
    assert main(["cluster", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert contents(place) == before


def test_what_has_no_effect_is_said(place: Path) -> None:
    assert main(["cluster", "farm.jsonl", "--k", "2", "--output", "out"]) == 0
    with pytest.warns(UserWarning, match="--seed has no effect without QUESTIONS_FILE"):
        assert main(["cluster", "--output", "out", "--similar", NEW, "--seed", "3"]) == 0


def test_questions_without_solutions_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("bare.jsonl"), [{"question": row["question"]} for row in rows()[:5]] + rows()[5:])
    assert main(["cluster", "bare.jsonl", "--k", "2"]) == 0
    assert "5 of 24 questions have no reasoning or no solution" in capsys.readouterr().out


@pytest.mark.slow
def test_real_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SHARED / "gsm8k" / "test.jsonl"
    if not source.is_file():
        pytest.skip("no shared data beside this checkout")
    assert main(["cluster", str(source), "--output", str(tmp_path / "out"), "--similar", "How fast is the car?"]) == 0
    for k in (16, 40):
        assert len(list((tmp_path / "out" / f"k{k}" / "clusters").iterdir())) == k
        documents = json.loads((tmp_path / "out" / f"data_k{k}.json").read_text())
        assert len(documents) == k
        assert all(document["reasoning"] and document["solution"] for document in documents)
    assert "k = 40: cluster" in capsys.readouterr().out
