"""Runs of the compressor through the command line: shared baselines, controls, files of the brief, bad input."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import yaml
from squad_tiny import squad

import kvc
from kvc.__main__ import main
from kvc.commands.ablations import run_single_ablation
from kvc.errors import UserError
from kvc.methods.squad import CompressionConfig, ContextCompressor
from kvc.methods.squad.baselines import METHOD, SIZED, Arms
from kvc.methods.squad.brief import run_name

BUDGET = {"class_path": "kvc.methods.squad.FixedSlots", "init_args": {"slots": 6}}


def results(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())


def predictions(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def without_times(record: Any) -> Any:
    return {key: value for key, value in record.items() if "seconds" not in key}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """`baselines`, a `control` and a compressor `alone` that measured its own baselines."""
    folder = tmp_path_factory.mktemp("squad")
    config = cases.squad_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    assert cases.fit(config, folder / "alone") == 0
    control = cases.squad_config(tiny_folder)
    control["trainer"]["max_epochs"] = 1
    for key in ("compressor", "source", "budget"):
        del control["model"]["init_args"][key]
    control["model"]["init_args"]["mode"] = "full_text"
    assert cases.fit(control, folder / "control") == 0
    text = {
        "trainer": {key: value for key, value in config["trainer"].items() if key in {"accelerator", "devices"}},
        "model": {
            "class_path": "kvc.methods.squad.TextBaselines",
            "init_args": {"backbone": {"pretrained": str(tiny_folder)}, "budgets": [BUDGET], "max_new_tokens": 4},
        },
        "data": config["data"],
    }
    assert main(["test", *cases.written(text, folder / "baselines"), "--run_dir", str(folder / "baselines")]) == 0
    return folder


def beside(runs: Path, tiny_folder: Path, *names: str) -> Any:
    config = cases.squad_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    config["model"]["init_args"]["baselines"] = [str(runs / name) for name in names]
    return config


def test_baselines_are_measured_once_and_shared(
    runs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a baseline was measured again")

    monkeypatch.setattr(Arms, "records", never)
    assert cases.fit(beside(runs, tiny_folder, "baselines", "control"), tmp_path / "run") == 0
    alone, shared = (predictions(run / "eval" / "test") for run in (runs / "alone", tmp_path / "run"))
    for one, two in zip(alone, shared, strict=True):
        assert set(two["arms"]) == {METHOD, "full", "no_context", *SIZED, "full_tuned"}
        for arm in one["arms"]:
            assert without_times(one["arms"][arm]) == without_times(two["arms"][arm]), arm
    tuned = predictions(runs / "control" / "eval" / "test")
    assert [record["arms"]["full_tuned"] for record in shared] == [record["arms"][METHOD] for record in tuned]
    found = results(tmp_path / "run")
    assert {"full_tuned", "full", "no_context", *SIZED} == set(found["arms"])
    assert {"full_tuned", "full", "no_context", *SIZED} == set(found["differences"]["f1"])
    assert {"f1", "em", "ratio", "ratio_mean", "expanded", "distinct", "collapsed"} <= set(found["metrics"])
    assert found["metrics"]["ratio"]["value"] == pytest.approx(
        sum(record["context_tokens"] for record in shared) / (6 * len(shared))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data.init_args.split_seed": 7}, "another data"),
        ({"model.init_args.max_new_tokens": 3}, "another max_new_tokens"),
        ({"model.init_args.budget.init_args.slots": 5}, None),
    ],
)
def test_baselines_of_something_else_are_left_out(
    change: dict[str, Any], reason: str | None, runs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = beside(runs, tiny_folder, "baselines")
    for dotted, value in change.items():
        *parents, key = dotted.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cases.fit(config, tmp_path / "run") == 0
    told = [str(warning.message) for warning in caught if "model.baselines" in str(warning.message)]
    assert [reason in text for text in told if reason] == ([True] if reason else [])
    found = results(tmp_path / "run")
    assert {"full", "no_context", *SIZED} == set(found["arms"])
    if reason is None:
        assert found["arms"]["first"]["kv_tokens_context"]["value"] == 5


def test_a_constant_compressor_rings_the_alarm(runs: Path) -> None:
    made = kvc.load(runs / "alone")
    assert isinstance(made, ContextCompressor)
    records = predictions(runs / "alone" / "eval" / "test")
    for record in records:
        record["answer"] = "the of"
    with pytest.warns(UserWarning, match="predictions are almost all the same"):
        assert made.summarize(records).metrics["collapsed"].value == 1
    for record in records:
        record["answer"] = record["gold"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.summarize(records).metrics["collapsed"].value == 0


def test_what_is_recovered_lies_between_the_controls(runs: Path) -> None:
    made, records = kvc.load(runs / "alone"), predictions(runs / "alone" / "eval" / "test")
    for row, record in enumerate(records):
        for arm, value in (("full", 1.0), ("no_context", 0.0), (METHOD, float(row % 2))):
            record["arms"][arm] |= {"f1": value, "em": value > 0}
    metrics = made.summarize(records).metrics
    assert metrics["f1_recovered"].value == pytest.approx(3 / 7)
    for record in records:
        record["arms"]["full_tuned"] = {**record["arms"]["full"], "f1": 0.5}
        record["arms"]["no_context"]["f1"] = 0.1
    assert made.summarize(records).metrics["f1_recovered"].value == pytest.approx((3 / 7 - 0.1) / 0.4)
    for record in records:
        record["arms"]["full_tuned"]["f1"] = 0.1
    assert "f1_recovered" not in made.summarize(records).metrics


def test_files_of_the_brief(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ablations"
    for _ in range(2):
        assert main(["ablations", str(runs / "alone"), "--out", str(out)]) == 0
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert folder.name.startswith("M6_pooling_")
    assert folder.name.endswith("_s42")
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.json", "sample_predictions.json", "predictions.jsonl"} <= files
    assert {"kvc.safetensors", "adapter_model.safetensors"} <= files
    assert not [name for name in files if name.endswith((".pt", ".ckpt", ".bin"))]
    metrics = json.loads((folder / "metrics.json").read_text())
    found = results(runs / "alone")
    assert metrics["final_f1"] == found["metrics"]["f1"]["value"]
    assert metrics["baseline_f1"] == found["arms"]["full"]["f1"]["value"]
    assert metrics["params"]["compressor"] == found["sizes"]["compressor_parameters"]
    assert len(metrics["curves"]["val/loss"]) == 1
    assert {"train/teacher_forcing", "train/kd"} <= metrics["curves"].keys()
    samples = json.loads((folder / "sample_predictions.json").read_text())
    assert {"question", "completion", "golds", "f1", "em"} <= samples[0].keys()
    (row,) = json.loads((out / "results_summary.json").read_text())
    assert row["run"] == folder.name
    assert row["compression_ratio"] == found["metrics"]["ratio"]["value"]
    assert (out / "results_summary.csv").read_text().count("\n") == 2
    assert kvc.load(folder).trained_state().keys() == kvc.load(runs / "alone").trained_state().keys()
    assert main(["ablations", str(runs / "baselines"), "--out", str(out)]) == 2
    assert "not of a context compressor" in capsys.readouterr().err


def test_an_exported_compressor_says_the_same(runs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "alone"), str(tmp_path / "out")]) == 0
    from squad_tiny import batch

    data = batch(squad(tiny_folder), [0, 1])
    one, two = (kvc.load(folder) for folder in (runs / "alone", tmp_path / "out"))
    with torch.no_grad():
        assert [without_times(r["arms"][METHOD]) for r in one.records(data)] == [
            without_times(r["arms"][METHOD]) for r in two.records(data)
        ]
        assert torch.equal(one.step(data).loss_sum, two.step(data).loss_sum)


def test_a_tuned_control_teaches(runs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "control"), str(tmp_path / "teacher")]) == 0
    config = cases.squad_config(tiny_folder)
    config["trainer"]["max_epochs"] = 1
    config["model"]["init_args"]["teacher"] = {
        "pretrained": str(tiny_folder),
        "merge_adapter": str(tmp_path / "teacher"),
    }
    assert cases.fit(config, tmp_path / "run") == 0
    names = cases.checkpoint(tmp_path / "run")["state_dict"].keys()
    assert not [name for name in names if name.startswith("teacher")]
    shutil.rmtree(tmp_path / "teacher")
    # Whoever only uses the compressor needs no teacher.
    assert kvc.load(tmp_path / "run").teacher is None


@pytest.mark.parametrize("architecture", ["gist", "anchor"])
def test_the_call_of_the_brief(architecture: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = CompressionConfig(
        architecture=architecture,
        target_length=8,
        loss_weights={"teacher_forcing": 0.7, "generation": 0.2, "contrastive": 0.1 if architecture == "gist" else 0},
        model=str(tiny_folder),
        train_samples=8,
        val_samples=4,
        eval_samples=4,
        epochs=1,
        batch_size=4,
        gradient_accumulation=2,
        max_new_tokens=3,
        output_dir=str(tmp_path),
    )
    first = run_single_ablation(config)
    assert {"final_f1", "final_em", "best_f1", "baseline_f1", "baseline_em", "compression_ratio"} <= first.keys()
    assert first["compression_ratio"] > 1
    stored = yaml.safe_load((Path(first["run"]) / "config.yaml").read_text())["model"]["init_args"]
    assert stored["optim"]["lrs"] == {"lora": 5e-5}
    assert [term["init_args"]["weight"] for term in stored["losses"]][:2] == [0.7, 0.2]
    assert run_single_ablation(config) == first


def test_runs_of_one_architecture_have_names_of_their_own() -> None:
    configs = [CompressionConfig(), CompressionConfig(source="hidden:last"), CompressionConfig(loss_weights={"kd": 1})]
    names = {run_name(config.as_config()["model"], 42) for config in configs}
    assert len(names) == 3
    model = configs[0].as_config()["model"]
    model["init_args"]["baselines"] = ["runs/baselines"]
    assert run_name(model, 42) in names
    assert all(name.startswith("M64_cross_attention_") for name in names)


def test_settings_of_the_brief_that_are_none() -> None:
    with pytest.raises(UserError, match="architecture: there is no 'gits'"):
        CompressionConfig(architecture="gits")
    with pytest.raises(UserError, match="loss_weights: there is no 'kl'"):
        CompressionConfig(loss_weights={"kl": 1.0})
    with pytest.raises(UserError, match="loss_weights: the weight of kd must not be negative"):
        CompressionConfig(loss_weights={"kd": -1.0})


def document(answer: str = "red", start: int = 8) -> str:
    qas = [{"id": "1", "question": "Which?", "answers": [{"text": answer, "answer_start": start}]}]
    context = "The car red is parked in the street, and nobody knows whose it is."
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]})


REFUSE = {"class_path": "kvc.methods.squad.FixedSlots", "init_args": {"slots": 300, "policy": "refuse"}}
BAD: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "more slots than tokens": (
        {"budget": REFUSE, "compressor": {"class_path": "kvc.methods.squad.MeanPool"}},
        {},
        "budget.slots: 300 slots are more than the",
    ),
    "more slots than the compressor has": ({"budget": {**BUDGET, "init_args": {"slots": 7}}}, {}, "compressor.slots"),
    "no such compressor": ({"compressor": "kvc.methods.squad.MeanPol"}, {}, "model.compressor"),
    "no such baselines": ({"baselines": ["nowhere"]}, {}, "model.baselines: nowhere holds no result.json"),
    "no LoRA": ({"backbone": {"lora": None}}, {}, "model.backbone.lora: a source that is not frozen"),
    "answer outside the context": ({}, {"squad.json": document(start=9)}, "squad.json"),
    "answer beyond the context": ({}, {"squad.json": document(start=900)}, "squad.json"),
    "malformed JSON": ({}, {"squad.json": '{"data": [\n{"title": }]}'}, "squad.json line 2: not valid JSON"),
    "JSON of something else": ({}, {"squad.json": '{"rows": []}'}, "squad.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, files, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    config = cases.squad_config(tiny_folder)
    for key, value in change.items():
        given = config["model"]["init_args"].get(key)
        config["model"]["init_args"][key] = {**given, **value} if key == "backbone" else value
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        config["data"]["init_args"] = {"path": name, "batch_size": 4}
    capsys.readouterr()
    assert cases.fit(config, tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.startswith("kvc: error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()
