"""One list of method x configuration that shared tests run over, and the few parts that only tests need."""

import os
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from kvc.__main__ import main
from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split
from kvc.core.results import Summary, bootstrap_mean
from kvc.methods.lm import LanguageModel

Config = dict[str, Any]
KILL_AT, KILL_BATCH, SIGNAL = "KVC_TEST_KILL_AT", "KVC_TEST_KILL_BATCH", "KVC_TEST_SIGNAL"


class KillAt(Callback):
    """Kills the process after the optimiser step or batch that the environment names, or sends it another signal.

    Every run of a test carries it, so that killed and uninterrupted runs have the same configuration.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, batches = os.environ.get(KILL_AT), os.environ.get(KILL_BATCH)
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if (step and trainer.global_step == int(step)) or (batches and done == int(batches)):
            os.kill(os.getpid(), int(os.environ.get(SIGNAL, signal.SIGKILL)))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if os.environ.get(KILL_AT) == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class RaggedText(KvcDataModule):
    """Rows of random tokens, each of another length."""

    gives = ("input_ids", "labels")

    def __init__(
        self,
        rows: int = 24,
        batch_size: int = 4,
        longest: int = 20,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, None, num_workers, shuffle, seed)
        self.rows, self.longest = rows, longest

    def dataset(self, split: Split) -> Any:
        return _RaggedRows(self.rows if split == "train" else 7, self.longest, {"train": 0, "val": 1, "test": 2}[split])

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        return pad_rows

    def data_hash(self) -> str:
        return f"ragged-{self.rows}-{self.longest}"


class _RaggedRows:
    def __init__(self, rows: int, longest: int, split: int) -> None:
        self.rows, self.longest, self.split = rows, longest, split

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, torch.Tensor]:
        generator = seeds.generator(7, self.split, key[1])
        length = int(torch.randint(3, self.longest + 1, (), generator=generator))
        return key[1], torch.randint(3, 1200, (length,), generator=generator)


def pad_rows(rows: list[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Right-padded batch; the padding ids are ordinary tokens, so that a leak shows."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row for _, row in rows]
    return {
        "id": torch.tensor([number for number, _ in rows]),
        "input_ids": pad(ids, batch_first=True, padding_value=77),
        "labels": pad(ids, batch_first=True, padding_value=-100),
    }


class RaggedModel(LanguageModel):
    """A language model whose evaluation is the loss of each row."""

    @torch.no_grad()
    def records(self, batch: Any) -> list[dict[str, Any]]:
        records = []
        for row, number in enumerate(batch["id"].tolist()):
            output = self.step({key: value[row : row + 1] for key, value in batch.items()})
            records.append({"id": number, "loss": float(output.loss_sum / output.num_tokens)})
        return records

    def summarize(self, records: Any) -> Summary:
        return Summary(metrics={"loss": bootstrap_mean([record["loss"] for record in records], self.seed)})


TRAINER: Config = {
    "accelerator": "cpu",
    "devices": 1,
    "deterministic": True,
    "max_epochs": 2,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "callbacks": [{"class_path": "cases.KillAt"}],
}


def comp_config(tiny_folder: Path, dropout: float = 0.1) -> Config:
    """COMP classifier, six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "kvc.methods.comp.CompClassifier",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder)},
                "dropout": dropout,
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {
            "class_path": "kvc.data.comp.CompTraces",
            "init_args": {"counts": [24, 6, 7], "steps": [2, 4], "batch_size": 4},
        },
    }


def lora_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """LoRA language model on ragged rows, six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "cases.RaggedModel",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2, "dropout": dropout}},
                "train": "lora",
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {"class_path": "cases.RaggedText", "init_args": {}},
    }


def ccm_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """CCM with merged memory and distillation on synthetic traces, six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "kvc.methods.ccm.CompressedContextMemory",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2, "dropout": dropout}},
                "kind": "merge_recur",
                "slots": 2,
                "distillation": {"weight": 0.5},
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {
            "class_path": "kvc.data.segments.SegmentedTraces",
            "init_args": {"counts": [24, 6, 7], "steps": [2, 4], "batch_size": 4},
        },
    }


def autocompressor_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """Fixed-length summaries, LoRA, two substeps of two segments of random lengths; six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "kvc.methods.autocompressor.AutoCompressor",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2, "dropout": dropout}},
                "summary": {
                    "class_path": "kvc.methods.autocompressor.summaries.Fixed",
                    "init_args": {"summary_length": 3},
                },
                "training_substeps": 2,
                "randomize_substeps": True,
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {
            "class_path": "kvc.data.documents.Documents",
            "init_args": {"counts": [24, 6, 7], "block_size": 280, "closing": 30, "batch_size": 4},
        },
    }


def variable_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """The same with variable-length summaries."""
    config = autocompressor_config(tiny_folder, dropout)
    config["model"]["init_args"]["summary"] = {
        "class_path": "kvc.methods.autocompressor.summaries.Variable",
        "init_args": {"compression_max_len": 2},
    }
    return config


def squad_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """Contexts of questions compressed by weighted pooling, with distillation; six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "kvc.methods.squad.ContextCompressor",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2, "dropout": dropout}},
                "compressor": {
                    "class_path": "kvc.methods.squad.WeightedPooling",
                    "init_args": {"slots": 6, "max_length": 48},
                },
                "budget": {"class_path": "kvc.methods.squad.FixedSlots", "init_args": {"slots": 6}},
                "source": {"frozen": False},
                "max_new_tokens": 4,
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {
            "class_path": "kvc.data.squad.Squad",
            "init_args": {"counts": [24, 6, 7], "facts": [2, 4], "batch_size": 4},
        },
    }


def gist_config(tiny_folder: Path, dropout: float = 0.2) -> Config:
    """Gist tokens on synthetic passages, six steps an epoch."""
    return {
        "trainer": deepcopy(TRAINER),
        "model": {
            "class_path": "kvc.methods.gist.GistTokens",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2, "dropout": dropout}},
                "train": "lora",
                "count": {"class_path": "kvc.methods.gist.GistRatio", "init_args": {"ratio": 8}},
                "max_new_tokens": 3,
                "optim": {"lr": 0.01, "warmup": 2},
            },
        },
        "data": {
            "class_path": "kvc.data.squad.Squad",
            "init_args": {"counts": [24, 6, 7], "facts": [2, 6], "batch_size": 4},
        },
    }


CASES: dict[str, Callable[..., Config]] = {
    "comp": comp_config,
    "lora": lora_config,
    "ccm": ccm_config,
    "autocompressor": autocompressor_config,
    "autocompressor_variable": variable_config,
    "squad": squad_config,
    "gist": gist_config,
}
"""A configuration of every trainable method: `CASES[name](tiny_folder, dropout=0.0)`."""


def fit(config: Config, run: Path, *options: str) -> int:
    """`python -m kvc fit` in this process; the configuration file lies beside the run folder."""
    return main(["fit", *written(config, run), "--run_dir", str(run), *options])


def written(config: Config, run: Path) -> tuple[str, str]:
    """Write `config` beside `run`; returns the option that names it."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return "--config", str(path)


def fit_killed(config: Config, run: Path, step: int, *options: str) -> None:
    """The same in a forked child that is killed after `step`; asserts that it was."""
    child = os.fork()
    if child == 0:
        os.environ[KILL_AT] = str(step)
        code = 1
        try:
            code = fit(config, run, *options)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the run ended by itself ({status})"
    assert os.WTERMSIG(status) == signal.SIGKILL


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    """A trainer checkpoint of a run."""
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same_bits(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        return [path for key in one for path in same_bits(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: length"]
        return [path for i, pair in enumerate(zip(one, other)) for path in same_bits(*pair, f"{where}/{i}")]
    return [] if type(one) is type(other) and one == other else [where]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two state dicts."""
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
