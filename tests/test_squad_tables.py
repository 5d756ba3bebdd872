"""The pooled table of context compressors: made-up runs of known numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.squad_accuracy import main, picture
from experiments.squad_labels import label
from kvc.core.results import Value

COUNT = 20
TOKENS = 80


def answer(right: bool, f1: float, rows: int, seconds: float = 0.02) -> dict[str, Any]:
    times = {"seconds": seconds, "compress_seconds": seconds / 4, "prefill_seconds": 0.0, "decode_seconds": 0.0}
    kept = {"kv_tokens_context": rows, "kv_tokens_final": rows + 9, "kv_bytes_context": 8.0 * rows}
    said = {"completion": " so", "answer": "so", "new_tokens": 2, "kv_bytes_final": 8.0 * (rows + 9)}
    return {"em": right, "f1": f1, **kept, **said, **times}


def run(
    folder: Path,
    seed: int,
    share: float,
    rows: int,
    arms: dict[str, tuple[float, int]],
    data: str = "one",
    **model: Any,
) -> str:
    """Questions of which the first `share` are right, as those of each arm are; F1 of the others is 0.2."""
    (folder / "eval" / "test").mkdir(parents=True)
    settings = {"mode": "compress", "compressor": None, "source": None, "budget": ratio(4), **model}
    settings.setdefault("losses", [cls("losses.TeacherForcing", weight=1.0)])
    config = {"model": {"class_path": "kvc.methods.squad.ContextCompressor", "init_args": settings}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sizes = {"compressor_parameters": 0 if settings["mode"] != "compress" else 1234, "lora_parameters": 99}
    result = {"seed": seed, "data": {"hash": data}, "sizes": sizes, "timing": {"fit_seconds": 10.0 * seed}}
    (folder / "result.json").write_text(json.dumps(result))
    wanted = {"method": (share, rows), **arms}
    records = []
    for number in range(COUNT):
        said = {}
        for name, (part, kept) in wanted.items():
            right = number < part * COUNT
            said[name] = answer(right, 1.0 if right else 0.2, kept)
        records.append({"id": number, "context_tokens": TOKENS, "arms": said})
    (folder / "eval" / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder)


def ratio(value: float) -> dict[str, Any]:
    return {"class_path": "kvc.methods.squad.FixedRatio", "init_args": {"ratio": value}}


def cls(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"kvc.methods.squad.{name}", "init_args": settings}


BASE = {"full": (0.9, TOKENS), "no_context": (0.0, 0)}
SIZED = {"first": (0.2, 20), "last": (0.1, 20), "random": (0.1, 20), "mean_pool": (0.0, 20)}


def controls(folder: Path, seed: int, full: float = 1.0, data: str = "one") -> list[str]:
    return [
        run(folder / f"full-{seed}", seed, full, TOKENS, BASE, data, mode="full_text"),
        run(folder / f"none-{seed}", seed, 0.0, 0, BASE, data, mode="no_context"),
    ]


def table(folders: list[str], out: Path) -> dict[str, Any]:
    assert main([*folders, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_runs_are_pooled_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    # A stored copy of a control counts only where the control itself is not among the runs.
    stored = {"full_tuned": (0.5, TOKENS), "no_context_tuned": (0.5, 0)}
    for seed, share in ((1, 0.5), (2, 0.7)):
        folders += controls(tmp_path, seed)
        folders.append(run(tmp_path / f"ours-{seed}", seed, share, 20, {**BASE, **SIZED, **stored}))
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    assert main([*folders, "--out", str(out), "--png", str(png)]) == 0
    result = json.loads(out.read_text())
    assert (result["n"], result["data_sets"]) == (COUNT, 1)
    assert list(result["arms"]) == [
        "full text, tuned",
        "no context, tuned",
        "full text, base model",
        "no context, base model",
        "MeanPool of frozen states, r4",
        "first tokens, r4",
        "last tokens, r4",
        "random tokens, r4",
        "untrained means of embeddings, r4",
    ]
    ours = result["arms"]["MeanPool of frozen states, r4"]
    assert ours["em"]["value"] == pytest.approx(0.6)
    assert ours["f1"]["value"] == pytest.approx(0.6 + 0.4 * 0.2)
    assert ours["by_seed"] == pytest.approx([0.6, 0.76])
    assert ours["em_recovered"]["value"] == pytest.approx(0.6)
    assert ours["f1_recovered"]["value"] == pytest.approx((0.68 - 0.2) / 0.8)
    assert ours["f1_recovered"]["low"] < 0.6 < ours["f1_recovered"]["high"]
    assert ours["f1_below_full"]["value"] == pytest.approx(0.32)
    assert ours["ratio"]["value"] == pytest.approx(4)
    assert ours["seconds"]["value"] == pytest.approx(0.02)
    assert (ours["compressor_parameters"], ours["fit_seconds"]) == (1234, 15)
    control = result["arms"]["full text, tuned"]
    assert control["em_recovered"] == {"value": 1, "low": 1, "high": 1, "n": COUNT}
    assert "ratio" not in result["arms"]["no context, tuned"]
    printed = capsys.readouterr().out
    assert "| MeanPool of frozen states, r4 | 0.600 [" in printed
    assert "| 4.00 | 1,234 | 20.0 | 5.0 |" in printed
    assert "both tuned: F1 0.800 [0.800, 0.800], exact match 1.000 [1.000, 1.000]" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_control_and_stored_baselines_serve_all(tmp_path: Path) -> None:
    stored = {"full_tuned": (1.0, TOKENS), "no_context_tuned": (0.0, 0)}
    base = tmp_path / "base"
    sized = {f"{name} {budget}": rest for name, rest in SIZED.items() for budget in ("r4", "M8")}
    folders = [run(base, 1, 0.9, TOKENS, {**BASE, **sized})]
    config = {"model": {"class_path": "kvc.methods.squad.TextBaselines", "init_args": {}}}
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    folders += [run(tmp_path / "ours", 1, 0.5, 20, {**BASE, **SIZED, **stored})]
    arms = table(folders, tmp_path / "out.json")["arms"]
    assert arms["MeanPool of frozen states, r4"]["em_recovered"]["value"] == pytest.approx(0.5)
    assert {"first tokens, r4", "first tokens, M8", "full text, tuned"} <= set(arms)
    assert not any("baselines" in name for name in arms)


def test_data_sets_are_pooled_question_by_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for seed, data, share in ((1, "one", 0.5), (2, "two", 1.0)):
        folders += controls(tmp_path, seed, data=data)
        folders.append(run(tmp_path / f"ours-{seed}", seed, share, 20, BASE, data))
    result = table(folders, tmp_path / "out.json")
    assert (result["n"], result["data_sets"]) == (2 * COUNT, 2)
    ours = result["arms"]["MeanPool of frozen states, r4"]
    assert (ours["em"]["value"], ours["em"]["n"]) == (pytest.approx(0.75), 2 * COUNT)
    assert ours["by_seed"] == pytest.approx([0.6, 1.0])
    folders.append(run(tmp_path / "more", 1, 0.5, 10, BASE, "one", budget=ratio(8)))
    assert main([*folders, "--out", str(tmp_path / "x.json")]) == 2
    assert "'MeanPool of frozen states, r8' was not measured on all data sets" in capsys.readouterr().err


def test_nothing_is_recovered_where_there_is_nothing_to_recover(tmp_path: Path) -> None:
    folders = [*controls(tmp_path, 1, full=0.0), run(tmp_path / "ours", 1, 0.5, 20, BASE)]
    ours = table(folders, tmp_path / "out.json")["arms"]["MeanPool of frozen states, r4"]
    assert "f1_recovered" not in ours
    assert ours["f1_below_full"]["value"] == pytest.approx(-0.4)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, out = controls(tmp_path, 1), str(tmp_path / "out.json")
    again = run(tmp_path / "again", 1, 0.0, 0, BASE, mode="no_context")
    other = Path(run(tmp_path / "other", 1, 0.0, 0, BASE))
    (other / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "kvc.methods.gist.GistTokens"}}))
    for words, given in (
        ("no run of 'no context, tuned'", pair[:1]),
        ("a second run of 'no context, tuned' with the seed 1", [*pair, again]),
        ("a run of GistTokens, which this table does not know", [*pair, str(other)]),
        ("not finished", [*pair, str(tmp_path)]),
    ):
        assert main([*given, "--out", out]) == 2
        assert words in capsys.readouterr().err
    assert not Path(out).exists()


def test_labels_say_what_differs(tmp_path: Path) -> None:
    given = {"project": True, "norm": True}
    source = {"states": "hidden:last", "bidirectional": True, "frozen": False}
    usual = [cls("losses.Kd", weight=1.0), cls("losses.TeacherForcing", weight=1.0)]
    brief = [cls("losses.TeacherForcing", weight=0.5), cls("losses.OnPolicyKd", weight=0.3)]
    slots = cls("CrossAttention", slots=32, heads=None, query_init="tokens")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"compressor": cls("MeanPool", **given), "source": source, "losses": usual[1:]},
            "MeanPool of adapted states, r4",
        ),
        ({"source": {"states": "embeddings"}, "budget": None, "losses": None}, "MeanPool of embeddings, distilled, r8"),
        (
            {"source": {"states": "hidden:3", "bidirectional": False, "residual": True}},
            "MeanPool of frozen states of layer 3 read causally and embeddings, r4",
        ),
        ({"compressor": cls("Anchors", bidirectional=True), "losses": usual}, "Anchors, distilled, r4"),
        (
            {"compressor": slots, "budget": cls("FixedSlots", slots=32, policy="exact"), "losses": usual[1:]},
            "CrossAttention(query_init=tokens) of frozen states, M32",
        ),
        (
            {"losses": brief, "positions": "spread", "frozen_decoder": True},
            "MeanPool of frozen states, loss TeacherForcing(weight=0.5) + OnPolicyKd(weight=0.3), spread positions,"
            " frozen decoder, r4",
        ),
        ({"mode": "full_text"}, "full text, tuned"),
    ]
    for number, (settings, name) in enumerate(cases):
        assert label(Path(run(tmp_path / str(number), 1, 1.0, 1, {}, **settings))) == name


def test_the_picture_has_a_line_for_each_compressor() -> None:
    def row(ratio: float | None, f1: float) -> dict[str, Any]:
        return {"ratio": None if ratio is None else Value(ratio), "f1": Value(f1, f1 - 0.1, f1 + 0.1)}

    rows = {"full text, tuned": row(1, 0.9), "no context, tuned": row(None, 0.1), "first tokens, r4": row(4, 0.2)}
    rows |= {"A, r16": row(15, 0.5), "A, r4": row(4, 0.8), "B, r8": row(8, 0.7), "first tokens, r16": row(15, 0.1)}
    (axis,) = picture(rows).axes
    _, names = axis.get_legend_handles_labels()
    assert set(names) == {"full text, tuned", "no context, tuned", "first tokens", "A", "B"}
    (line,) = [each for each in axis.containers if each.get_label() == "A"]
    assert line.lines[0].get_ydata().tolist() == [0.8, 0.5]
    (part,) = [each for each in axis.lines if each.get_label() == "first tokens"]
    assert list(part.get_xdata()) == [4, 15]
