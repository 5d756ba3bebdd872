"""Every YAML under configs/ says something that the program understands."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from kvc.cli import Cli, Parser, import_parts
from kvc.core.backbone import Backbone
from kvc.core.datamodule import KvcDataModule
from kvc.core.evaluation import Evaluation
from kvc.core.method import Method
from kvc.core.module import KvcModule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted([*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")])
FRAGMENTS = {"trainer", "backbone", "data", "model"}


class ParsedError(Exception):
    pass


class ParseOnly(Cli):
    """Stops when everything is parsed."""

    def before_instantiate_classes(self) -> None:
        raise ParsedError


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def parser_of(kind: str) -> ArgumentParser:
    parser = Parser()
    if kind == "trainer":
        parser.add_lightning_class_args(Trainer, "part")
    elif kind == "backbone":
        parser.add_argument("--part", type=Backbone)
    else:
        parser.add_subclass_arguments({"data": KvcDataModule, "model": KvcModule}[kind], "part", fail_untyped=False)
    return parser


def class_of(config: dict[str, Any]) -> type:
    import_parts()
    module, _, short = config["model"]["class_path"].rpartition(".")
    return getattr(__import__(module, fromlist=[short]), short)


def test_there_are_configs() -> None:
    assert {"trainer", "backbone"} <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(CONFIGS).parts[0] in FRAGMENTS], ids=name)
def test_fragment_is_understood(path: Path) -> None:
    parser = parser_of(path.relative_to(CONFIGS).parts[0])
    parser.parse_args(["--part", str(path)])


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(CONFIGS).parts[0] not in FRAGMENTS], ids=name)
def test_experiment_is_understood(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"model", "data"} <= config.keys(), (
        "an experiment names a model and data; fragments lie in their own folders"
    )
    import_parts()
    if isinstance(config["model"], str):
        config["model"] = yaml.safe_load((path.parent / config["model"]).read_text(encoding="utf-8"))
    kind = class_of(config)
    assert issubclass(kind, Method | Evaluation)
    command = "fit" if issubclass(kind, Method) else "test"
    with pytest.raises(ParsedError):
        ParseOnly([command, "--config", str(path), "--name", "parsed-only"])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("trainer", "devicez: 1\n"), ("backbone", "dtype: float8\n"), ("backbone", "overrides: 3\n")],
)
def test_a_wrong_fragment_is_noticed(kind: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(Exception, match=r"devicez|dtype|overrides"):
        parser_of(kind).parse_args(["--part", str(path)])
