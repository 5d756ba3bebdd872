"""Bad input: one sentence that names file, line or key, exit code 2, nothing half-written, nothing lost."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from kvc.__main__ import main

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples" / "traces.jsonl"
COMP, LM, REPORT = (f"kvc.methods.{name}" for name in ("comp.CompClassifier", "lm.LanguageModel", "lm.TaskReport"))
LORA = {"model.class_path": LM, "model.init_args.train": "lora"}


class Place(NamedTuple):
    """Where a case happens: the current folder, a tiny base model, and a finished run of it at `done`."""

    folder: Path
    base: Path

    def config(self, **changes: Any) -> str:
        """Write c.yaml: a small comp run with dotted keys changed; None removes one."""
        config: dict[str, Any] = {
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False},
            "model": {
                "class_path": COMP,
                "init_args": {"backbone": {"pretrained": str(self.base)}, "optim": {"lr": 0.001}},
            },
            "data": {"class_path": "kvc.data.comp.CompTraces", "init_args": {"counts": [6, 2, 2], "batch_size": 4}},
        }
        for dotted, value in changes.items():
            *parents, key = dotted.split(".")
            node = config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = value
            if value is None:
                del node[key]
        return self.write("c.yaml", yaml.safe_dump(config))

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def model(self, **files: bytes | None) -> str:
        """A copy of the base model in ./model with files replaced or, for None, left out."""
        shutil.copytree(self.base, self.folder / "model")
        for name, content in files.items():
            path = self.folder / "model" / f"{name.replace('_', '.')}"
            path.unlink() if content is None else path.write_bytes(content)
        return "./model"

    def checkpoint(self, change: Callable[[dict[str, Any]], Any] | bytes) -> list[str]:
        """Replace both checkpoints of the run, and test it."""
        for path in (self.folder / "done/checkpoints").iterdir():
            if isinstance(change, bytes):
                path.write_bytes(change)
            else:
                state = torch.load(path, weights_only=True)
                torch.save(change(state) or state, path)
        return ["test", "--run", "done", "--eval_name", "x"]


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def fit(*words: str, **changes: Any) -> Callable[[Place], list[str]]:
    return lambda at: ["fit", "--config", at.config(**changes), "--run_dir", "new", *words]


def over(**changes: Any) -> Callable[[Place], list[str]]:
    return lambda at: ["fit", "--config", at.config(**changes), "--run_dir", "done", "--overwrite", "true"]


def fit_file(content: str, **files: str) -> Callable[[Place], list[str]]:
    def build(at: Place) -> list[str]:
        for name, text in files.items():
            at.write(f"{name}.yaml", text)
        return ["fit", "--config", at.write("bad.yaml", content), "--run_dir", "new"]

    return build


def fit_data(content: str) -> Callable[[Place], list[str]]:
    key = "data.init_args.path"
    return lambda at: fit(**{key: at.write("traces.json", content)})(at)


def fit_base(**files: bytes | None) -> Callable[[Place], list[str]]:
    return lambda at: fit(**{"model.init_args.backbone.pretrained": at.model(**files)})(at)


def run(*words: str, **files: str) -> Callable[[Place], list[str]]:
    def build(at: Place) -> list[str]:
        for name, content in files.items():
            at.write(name.replace("_DOT_", ".").replace("_IN_", "/"), content)
        return [word.replace("C.YAML", at.config()) if "C.YAML" in word else word for word in words]

    return build


def checkpoint(change: Callable[[dict[str, Any]], Any] | bytes) -> Callable[[Place], list[str]]:
    return lambda at: at.checkpoint(change)


def record(**changes: Any) -> str:
    row = json.loads(SAMPLES.read_text().splitlines()[0])
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def no_checkpoints(at: Place) -> list[str]:
    shutil.rmtree(at.folder / "done/checkpoints")
    return ["test", "--run", "done", "--eval_name", "x"]


def interrupted(at: Place) -> list[str]:
    """Resume of a run whose last checkpoint was cut short."""
    (at.folder / "done/result.json").unlink()
    last = at.folder / "done/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:2000])
    return ["fit", "--config", at.config(), "--run_dir", "done"]


def model_part(class_path: str) -> str:
    return f"model:\n  class_path: {class_path}\n  init_args: {{backbone: part.yaml}}\ndata: kvc.data.comp.CompTraces\n"


CASES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    # the command line
    "unknown command": (run("fitt"), "no command 'fitt'"),
    "unknown option": (fit("--modle", "x"), "--modle: unknown option (did you mean --model?)"),
    "unknown nested option": (fit("--model.optim.lrr", "3"), "model.optim.lrr: unknown key (did you mean lr?)"),
    "unknown option of a part": (fit("--model.optm.lr", "3"), "model.optm.lr: unknown key"),
    "option without value": (fit("--eval_name"), "--eval_name"),
    "no place": (run("fit", "--config", "C.YAML"), "--name NAME"),
    "two places": (fit("--name", "x"), "--run_dir or --name, not both"),
    "name is a path": (run("fit", "--config", "C.YAML", "--name", "a/b"), "'a/b'"),
    "fit with --run": (fit("--run", "done"), "--run evaluates"),
    "wandb not installed": (fit("--wandb", "true", **{"trainer.logger": None}), ".[wandb]"),
    "wandb without loggers": (fit("--wandb", "true"), "no effect with trainer.logger: false"),
    "method on the wrong data": (
        fit(data={"class_path": "kvc.data.language.SyntheticText", "init_args": {"steps": 4}}),
        "data: CompClassifier needs batches with id, rows, draw, which SyntheticText does not give",
    ),
    "validation interval beyond the epoch": (
        fit(**{"trainer.val_check_interval": 50}),
        "trainer.val_check_interval: 50 exceeds the",
    ),
    # keys of the configuration
    "unknown section": (fit(**{"modell.class_path": COMP}), "modell.class_path: unknown key"),
    "unknown model key": (
        fit(**{"model.init_args.balanse": "focal"}),
        "model.balanse: unknown key (did you mean balance?)",
    ),
    "unknown data key": (fit(**{"data.init_args.bach_size": 3}), "data.bach_size: unknown key"),
    "unknown trainer key": (fit(**{"trainer.max_epoch": 3}), "trainer.max_epoch: unknown key"),
    "unknown optim key": (fit(**{"model.init_args.optim.lrr": 3}), "model.optim.lrr: unknown key"),
    "unknown lora key": (
        fit(**LORA, **{"model.init_args.backbone.lora": {"rr": 3}}),
        "model.backbone.lora.rr: unknown",
    ),
    "unknown callback key": (
        fit(**{"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitr": "x"}}]}),
        "trainer.callbacks.monitr: unknown key",
    ),
    "no data section": (fit(data=None), "data: missing"),
    "no model section": (fit(model=None), "model: missing"),
    # values of the configuration
    "lr is text": (fit(**{"model.init_args.optim.lr": "abc"}), "model.optim.lr: expected float, got abc"),
    "a seed for one part": (fit("--data.seed", "3"), "--data.seed has no effect, one seed goes to all parts"),
    "lr is text, on the line": (fit("--model.optim.lr", "abc"), "model.optim.lr: expected float, got abc"),
    "max_epochs is text": (fit(**{"trainer.max_epochs": "x"}), "trainer.max_epochs: expected int or null, got x"),
    "counts too short": (fit(**{"data.init_args.counts": [1, 2]}), "data.counts: expected tuple with 3 elements"),
    "unknown balance": (fit(**{"model.init_args.balance": "foo"}), "model.balance: expected one of 'balanced'"),
    "unknown dtype": (
        fit(**{"model.init_args.backbone.dtype": "fp16"}),
        "model.backbone.dtype: expected one of 'auto'",
    ),
    "unknown precision": (fit(**{"trainer.precision": "bf17"}), "trainer.precision: expected"),
    "optim is text": (fit(**{"model.init_args.optim": "fast"}), "model.optim: there is no class or file fast"),
    "model is a number": (fit(model=3), "model: expected the settings of a KvcModule"),
    "trainer is a list": (fit(trainer=[1]), "trainer: expected a mapping"),
    "seed_everything true": (fit(seed_everything=True), "seed_everything: give a number"),
    "decay too large": (fit(**{"model.init_args.optim.decay": 2.0}), "optim.decay must be in (0, 1], got 2.0"),
    "lora.r 0": (fit(**LORA, **{"model.init_args.backbone.lora": {"r": 0}}), "lora.r must be at least 1, got 0"),
    "batch_size 0": (fit(**{"data.init_args.batch_size": 0}), "data.batch_size must be at least 1"),
    "num_workers -1": (fit(**{"data.init_args.num_workers": -1}), "data.num_workers must not be negative"),
    "steps reversed": (fit(**{"data.init_args.steps": [5, 2]}), "data.steps"),
    "split too small": (fit(**{"data.init_args.split": [0.5, 0.1, 0.1]}), "data.split"),
    "share of training above 1": (
        fit(**{"data.init_args.path": "traces.json", "data.init_args.train_ratio": 80}),
        "data.train_ratio must lie between 0 and 1, got 80",
    ),
    "share of synthetic traces": (fit(**{"data.init_args.train_ratio": 0.8}), "data.train_ratio: synthetic traces"),
    "no validation data": (fit(**{"data.init_args.counts": [6, 0, 2]}), "no val split"),
    "unknown group": (fit(**{"model.init_args.optim.lrs": {"hed": 0.1}}), "optim.lrs: no group 'hed'"),
    "bf16-true": (fit(**{"trainer.precision": "bf16-true"}), "trainer.precision: bf16-true"),
    "own logger": (
        fit(**{"trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}}),
        "trainer.logger is set by kvc",
    ),
    "unknown accelerator": (fit(**{"trainer.accelerator": "cpuu"}), "trainer: You selected an invalid accelerator"),
    "no such device": (fit(**{"trainer.devices": "a"}), "trainer: `devices`"),
    "limit too large": (fit(**{"trainer.limit_train_batches": 7.5}), "trainer: You have passed invalid value 7.5"),
    # files of the configuration
    "no such config": (run("fit", "--config", "nope.yaml", "--run_dir", "new"), "nope.yaml"),
    "config breaks at line 4": (fit_file("trainer:\n  max_epochs: 1\n  devices: [1\nmodel: 3\n"), "bad.yaml line 4"),
    "config has a tab": (fit_file("trainer:\n\tmax_epochs: 1\n"), "bad.yaml line 2"),
    "config is a list": (fit_file("- a\n"), "bad.yaml: not a mapping"),
    "config is empty": (fit_file(""), "bad.yaml: not a mapping"),
    "no such part": (fit_file(model_part(COMP)), "bad.yaml: model.init_args.backbone: there is no file part.yaml"),
    "no such trainer part": (
        fit_file("trainer: part.yaml\n" + model_part(COMP), part=""),
        "part.yaml: not a mapping of settings",
    ),
    "part breaks at line 2": (
        fit_file(model_part(COMP), part="dtype: auto\npretrained: ["),
        "part.yaml line 2: not valid YAML",
    ),
    "unknown key in a part": (
        fit_file(model_part(COMP), part="pretraind: tiny\n"),
        "model.backbone.pretraind: unknown",
    ),
    # classes
    "no such class": (fit(**{"model.class_path": f"{COMP}x"}), "has no attribute 'CompClassifierx'"),
    "no such module": (fit(**{"model.class_path": "kvc.methods.nope.X"}), "has no attribute 'nope'"),
    "no such short name": (fit(**{"model.class_path": "CompClasifier"}), "no class or file CompClasifier"),
    "data as model": (fit(**{"model.class_path": "kvc.data.comp.CompTraces"}), "CompTraces is not a KvcModule"),
    "model as data": (fit(**{"data.class_path": COMP}), "CompClassifier is not a KvcDataModule"),
    "fit of an Evaluation": (
        fit(**{"model.class_path": REPORT, "model.init_args.optim": None}),
        "TaskReport is an Evaluation",
    ),
    "test of an untrained method": (
        run("test", "--config", "C.YAML", "--run_dir", "new"),
        "CompClassifier is trained: test needs --run",
    ),
    # data
    "no such data": (fit(**{"data.init_args.path": "nope.jsonl"}), "nope.jsonl: no such file"),
    "data is a folder": (fit(**{"data.init_args.path": "/tmp"}), "/tmp: cannot be read"),
    "JSONL breaks at line 2": (fit_data(record() + '\n{"question": \n'), "traces.json line 2: not valid JSON"),
    "JSON list breaks at line 3": (fit_data("[\n{},\n{1}]"), "traces.json line 3: not valid JSON"),
    "record 2 lacks a key": (fit_data(f"[{record()}, {record(answer=None)}]"), "record 2: key 'answer' is missing"),
    "line 2 has a number": (fit_data(f"{record()}\n{record(question=3)}"), "line 2: key 'question' must be text"),
    "empty data": (fit_data(""), "traces.json: holds no records"),
    "empty list": (fit_data("[]"), "traces.json: holds no records"),
    "no markers": (fit_data(record(reasoning_with_compression="1 + 1 = 2\n#### 2", answer="2")), "<COMP> marker"),
    "Hub data offline": (fit(**{"data.init_args.path": "hub:nobody/nothing"}), "hub:nobody/nothing"),
    # base models
    "no such base": (fit(**{"model.init_args.backbone.pretrained": "./nope"}), "pretrained: there is no folder ./nope"),
    "base without config": (fit_base(config_json=None), "./model holds no config.json"),
    "base with broken config": (fit_base(config_json=b"{"), "./model"),
    "base without weights": (fit_base(model_safetensors=None), "cannot load the model of './model'"),
    "base with broken weights": (fit_base(model_safetensors=b"0" * 90), "cannot load the model of './model'"),
    "base on the Hub, offline": (
        fit(**{"model.init_args.backbone.pretrained": "no/body"}),
        "'no/body': HF_HUB_OFFLINE",
    ),
    "no flash attention": (
        fit(**{"model.init_args.backbone.attn_implementation": "flash_attention_2"}),
        "backbone.attn_implementation",
    ),
    "lora on nothing": (
        fit(**LORA, **{"model.init_args.backbone.lora": {"targets": ["nope"]}}),
        "backbone.lora.targets: ['nope']",
    ),
    "overrides of saved weights": (
        fit(**{"model.init_args.backbone.overrides": {"num_hidden_layers": 1}}),
        "backbone.overrides needs",
    ),
    # run folders
    "run folder below a file": (run("fit", "--config", "C.YAML", "--run_dir", "file/x", file="x"), "file/x"),
    "run folder is a file": (run("fit", "--config", "C.YAML", "--run_dir", "file", file="x"), "file is a file"),
    "run folder cannot be made": (run("fit", "--config", "C.YAML", "--run_dir", "/proc/kvc/x"), "/proc/kvc/x"),
    "folder of somebody else": (
        run("fit", "--config", "C.YAML", "--run_dir", "full", full_IN_a="x"),
        "full is not empty and holds no config.yaml",
    ),
    "identity clash": (
        lambda at: ["fit", "--config", at.config(**{"model.init_args.optim.lr": 0.1}), "--run_dir", "done"],
        "model.init_args.optim.lr: 0.001 there, 0.1 here",
    ),
    "overwrite with a bad value": (over(**{"model.init_args.optim.decay": 2.0}), "optim.decay"),
    "overwrite with an unknown group": (over(**{"model.init_args.optim.lrs": {"hed": 0.1}}), "optim.lrs"),
    "overwrite without data": (over(**{"data.init_args.path": "nope.jsonl"}), "nope.jsonl"),
    # trained runs
    "no such run": (run("test", "--run", "nope"), "there is no run folder nope"),
    "run is no run": (run("test", "--run", "full", full_IN_a="x"), "full holds no config.yaml"),
    "run with broken config": (
        run("test", "--run", "done", done_IN_config_DOT_yaml="a: 1\nb: [\n"),
        "done/config.yaml line 3",
    ),
    "run without checkpoint": (no_checkpoints, "done holds no checkpoint"),
    "--run and model settings": (run("test", "--run", "done", "--model.optim.lr", "3"), "leave out the model settings"),
    "--run and --name": (run("test", "--run", "done", "--name", "x"), "leave out --run_dir and --name"),
    "eval_name is a path": (run("test", "--run", "done", "--eval_name", "a/b"), "eval_name: 'a/b'"),
    "--run with other data": (
        run("test", "--run", "done", "--eval_name", "x", "--data.path", "nope.jsonl"),
        "nope.jsonl: no such file",
    ),
    "checkpoint of another method": (
        checkpoint(lambda state: state["kvc"].update(method=LM)),
        f"done/checkpoints/best.ckpt belongs to the method {LM}",
    ),
    "checkpoint of another base": (
        checkpoint(lambda state: state["kvc"].update(base="abc")),
        "done/checkpoints/best.ckpt was trained on another base model",
    ),
    "checkpoint lacks a tensor": (
        checkpoint(lambda state: state["state_dict"].pop("rate") and None),
        "done/checkpoints/best.ckpt lacks 1 trained tensors, e.g. rate",
    ),
    "checkpoint of another shape": (
        checkpoint(lambda state: state["state_dict"].update({"head.layers.0.bias": torch.zeros(3)})),
        "head.layers.0.bias: [3], here [32]",
    ),
    "checkpoint of somebody else": (checkpoint(lambda state: {"state_dict": {}}), "was not written by kvc"),
    "checkpoint is text": (checkpoint(b"hello"), "done/checkpoints/best.ckpt is broken"),
    "checkpoint is empty": (checkpoint(b""), "done/checkpoints/best.ckpt is broken"),
    "checkpoint cut short, test": (
        lambda at: at.checkpoint((at.folder / "done/checkpoints/best.ckpt").read_bytes()[:2000]),
        "done/checkpoints/best.ckpt is broken",
    ),
    "checkpoint cut short, resume": (interrupted, "done/checkpoints/last.ckpt is broken"),
    "checkpoint with code": (
        checkpoint(lambda state: {**state, "evil": Evil()}),
        "done/checkpoints/best.ckpt holds pickled objects",
    ),
    # the other commands
    "compare nothing": (run("compare"), "RUN"),
    "compare no run": (run("compare", "nope"), "there is no run folder nope"),
    "compare unfinished": (run("compare", "full", full_IN_config_DOT_yaml="a: 1"), "full holds no result.json"),
    "compare broken": (
        run("compare", "full", full_IN_result_DOT_json='{\n"a" 1}'),
        "full/result.json is not valid JSON",
    ),
    "compare unknown metric": (run("compare", "done", "--metric", "nope"), "--metric nope"),
    "export no run": (run("export", "nope", "out"), "there is no run folder nope"),
    "export to a full folder": (run("export", "done", "full", full_IN_a="x"), "full is not empty"),
    "export below a file": (run("export", "done", "file/x", file="x"), "file/x"),
    "annotate nothing": (run("annotate"), "--input and --output"),
    "annotate no input": (run("annotate", "--input", "nope", "--output", "new"), "nope: no such file"),
    "annotate unknown annotator": (run("annotate", "--annotator", "gpt"), "invalid choice: 'gpt'"),
    "annotate existing output": (
        run("annotate", "--input", str(SAMPLES), "--output", "file", file="x"),
        "--output file: exists, add --overwrite",
    ),
    "annotate below a file": (
        run("annotate", "--input", str(SAMPLES), "--output", "file/x", file="x"),
        "--output file/x: cannot be written",
    ),
    "completion of an unknown shell": (run("completion", "fishy"), "invalid choice: 'fishy'"),
}


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, also hidden ones, with a hash of its bytes; folders too."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in files.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A finished run in a folder `done`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KVC_CACHE", str(folder / "cache"))
        assert main(["fit", "--config", Place(folder, tiny_folder).config(), "--run_dir", "done"]) == 0
    return folder / "done"


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_sentence_and_leaves_no_trace(
    case: str,
    trained: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build, expected = CASES[case]
    here = tmp_path / "here"
    shutil.copytree(trained, here / "done")
    monkeypatch.chdir(here)
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    argv = build(Place(here, tiny_folder))
    before = contents(here)
    capsys.readouterr()

    assert main(argv) == 2

    printed = capsys.readouterr().err
    assert printed.startswith("kvc: error: ")
    assert printed.count("\n") == 1
    assert printed.endswith("\n")
    assert len(printed) < 400
    assert "Traceback" not in printed
    assert "Namespace(" not in printed
    assert expected in printed
    assert contents(here) == before


def test_good_input_after_bad_input_is_accepted(
    trained: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "done")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVC_CACHE", str(trained.parent / "cache"))
    place = Place(tmp_path, tiny_folder)
    before = contents(tmp_path)
    assert main(["test", "--run", "done"]) == 0
    assert contents(tmp_path) == before

    assert main(fit(**{"model.init_args.optim.decay": 2.0})(place)) == 2
    assert main(fit(**{"model.init_args.optim.decay": 0.5})(place)) == 0
    assert main(over(**{"model.init_args.optim.decay": 0.5})(place)) == 0
    assert "decay: 0.5" in (tmp_path / "done" / "config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "done", "new"]
