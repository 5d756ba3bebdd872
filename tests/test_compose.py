"""YAML files that name each other become one configuration, and nothing in them is lost."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvc.__main__ import main
from kvc.compose import compose
from kvc.errors import UserError
from kvc.runs import flatten

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PARTS = {"trainer", "backbone", "model", "data"}
EXPERIMENTS = [p for p in sorted(CONFIGS.rglob("*.yaml")) if p.parent.name not in PARTS]


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "main.yaml"


def test_later_keys_win_and_the_rest_of_a_part_stays(tmp_path):
    path = write(tmp_path, main="trainer: part.yaml\ntrainer.b: 3\nx.y.z: 1\n", part="a: 1\nb: 2\nc: {d: 4}\n")
    assert compose(path) == {"trainer": {"a": 1, "b": 3, "c": {"d": 4}}, "x": {"y": {"z": 1}}}


def test_a_part_after_a_key_wins(tmp_path):
    path = write(tmp_path, main="trainer.b: 3\ntrainer.e: 5\ntrainer: part.yaml\n", part="b: 2\n")
    assert compose(path) == {"trainer": {"b": 2, "e": 5}}


def test_parts_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "inner.yaml").write_text("v: 1\n")
    (tmp_path / "deep" / "outer.yaml").write_text("inner: inner.yaml\n")
    path = write(tmp_path, main="model: {init_args: {part: deep/outer.yaml}}\n")
    assert compose(path) == {"model": {"init_args": {"part": {"inner": {"v": 1}}}}}


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(UserError, match=r"main\.yaml: trainer: there is no file .*nope\.yaml"):
        compose(write(tmp_path, main="trainer: nope.yaml\n"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_setting_of_an_experiment_and_its_parts_is_parsed(path, capsys):
    command = "test" if path.name == "report.yaml" else "fit"
    assert main([command, "--config", str(path), "--print_config"]) == 0
    parsed = flatten(yaml.safe_load(capsys.readouterr().out))
    wanted = flatten(compose(path))
    assert "trainer.accelerator" in wanted
    for key, value in wanted.items():
        assert says(parsed[key], value), key
    part = yaml.safe_load(path.read_text())["trainer"]
    overridden = {
        key.removeprefix("trainer.") for key in yaml.safe_load(path.read_text()) if key.startswith("trainer.")
    }
    for key, value in yaml.safe_load((path.parent / part).read_text()).items():
        assert key in overridden or says(parsed[f"trainer.{key}"], value)


def says(parsed: Any, wanted: Any) -> bool:
    """Whether every setting is there; objects in a list also get their defaults."""
    if isinstance(wanted, list) and isinstance(parsed, list):
        return len(wanted) == len(parsed) and all(map(says, parsed, wanted))
    if isinstance(wanted, dict) and isinstance(parsed, dict):
        return all(key in parsed and says(parsed[key], value) for key, value in wanted.items())
    return bool(parsed == wanted)


def test_a_seed_for_one_part_warns_that_it_has_no_effect(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    model = {
        "class_path": "kvc.methods.comp.CompClassifier",
        "init_args": {"backbone": {"pretrained": str(tiny_folder)}},
    }
    data = {"class_path": "kvc.data.comp.CompTraces", "init_args": {"counts": [8, 2, 2], "batch_size": 4}}
    model["init_args"]["seed"] = 3
    path = tmp_path / "main.yaml"
    trainer = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    path.write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    with pytest.warns(UserWarning, match=r"model\.init_args\.seed has no effect"):
        assert main(["fit", "--config", str(path), "--run_dir", str(tmp_path / "run")]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]["seed"] == 42
