"""`fit`, `validate`, `test` and `predict`: LightningCLI in subclass mode over one run folder."""

import importlib
import pkgutil
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kvc.callbacks.checkpoint import LastCheckpoint
from kvc.callbacks.progress import LineProgress
from kvc.callbacks.result import ResultWriter
from kvc.callbacks.throughput import Throughput
from kvc.compose import compose
from kvc.core.checkpoint_io import AtomicCheckpointIO
from kvc.core.datamodule import KvcDataModule
from kvc.core.evaluation import Evaluation
from kvc.core.files import digest_files, write_text
from kvc.core.method import Method
from kvc.core.module import KvcModule
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.messages import one_sentence
from kvc.parser import DESCRIPTIONS, EXAMPLES, USAGES, Formatter, Parser
from kvc.runs import CONFIG, PREDICTIONS, RUNS, Claim, RunFolder, flatten

CONFIG_FLAGS = ("--config", "-c")


class Cli(LightningCLI):
    """LightningCLI that knows the run folder."""

    def __init__(self, argv: list[str]) -> None:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        self.argv = argv
        self.command = argv[0]
        self.folder = RunFolder(Path())
        self.claim: Claim | None = None
        self.trained: RunFolder | None = None
        self.run_config: dict[str, Any] = {}
        self.resuming = False
        self.exit_code = 0
        with self._all_or_nothing():
            super().__init__(
                KvcModule,
                KvcDataModule,
                save_config_callback=None,
                seed_everything_default=DEFAULT_SEED,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                parser_kwargs={
                    "prog": "python -m kvc",
                    "formatter_class": Formatter,
                    self.command: {
                        "description": DESCRIPTIONS[self.command],
                        "epilog": EXAMPLES[self.command],
                        "formatter_class": Formatter,
                        "usage": USAGES[self.command],
                    },
                },
                args=argv,
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What fails before training or evaluation has begun leaves no folder behind, and loses none."""
        try:
            yield
        except BaseException as error:
            if self.claim is not None:
                self.claim.undo()
            if isinstance(error, MisconfigurationException):
                raise UserError(f"trainer: {one_sentence(str(error))}") from error
            raise

    # ------------------------------------------------------------------ arguments

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command at hand, since each costs time; checkpoints are chosen by the run folder, not by hand."""
        skip = {"model", "datamodule", "ckpt_path", "weights_only", "verbose", "return_predictions"}
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders"}
        return {self.command: skip | loaders}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where a run lives, and one seed for everything."""
        add = parser.add_argument
        add("--run_dir", type=str | None, default=None, help="Folder of the run.")
        add("--name", type=str | None, default=None, help="Short for --run_dir runs/NAME; the same name resumes.")
        add("--overwrite", type=bool, default=False, help="Discard what the folder holds and start afresh.")
        add("--run", type=str | None, default=None, help="Evaluate this trained run (its model and best checkpoint).")
        add("--eval_name", type=str | None, default=None, help="Name of the evaluation; default: the command.")
        add("--save_every", type=int, default=0, help="Steps between resumable checkpoints; 0 saves at epoch ends.")
        add("--wandb", type=bool, default=False, help="Also log to Weights & Biases (needs kvc[wandb]).")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; with `--run`, on top of the run's own configuration."""
        with _composed(args[1:]) as rest:
            self._parse(parser, args[0], rest)

    def _parse(self, parser: LightningArgumentParser, command: str, rest: list[str]) -> None:
        run = next(iter(_options(rest, "--run")), None)
        if run is not None and command != "fit":
            self.trained = RunFolder(Path(run))
            stored = self.read_trained(self.trained)
            for key in ("run_dir", "name", "overwrite", "run", "eval_name", "save_every", "checkpoint"):
                stored.pop(key, None)
            _unlink(stored)
            with _stored_config(stored) as path:
                self.config = parser.parse_args([command, "--config", path, *rest])
            self.config[command].config = None
            given = self.config[command].model.as_dict()
            expected = parser.parse_object({command: stored}).as_dict()[command]["model"]
            if given != expected:
                raise UserError(f"--run {run} brings its own model: leave out the model settings, or train another run")
        else:
            if run is not None:
                raise UserError("--run evaluates a trained run; fit takes --run_dir or --name")
            self.config = parser.parse_args([command, *rest])

    def read_trained(self, run: RunFolder) -> dict[str, Any]:
        """The configuration of the run that `--run` names."""
        return run.read_config()

    # ------------------------------------------------------------------ the run folder

    def identify(self) -> None:
        """Find out which folder is meant, and the configuration without the trained checkpoint's digest."""
        command = str(self.subcommand)
        options = self.config[command]
        if not isinstance(options.trainer, Namespace):
            raise UserError(f"trainer: expected a mapping of settings, got {options.trainer}")
        self.config_dump: dict[str, Any]
        self._dump_config()
        self._warn_about_seeds()
        if self.trained is not None:
            if options.run_dir or options.name:
                raise UserError("--run evaluates into RUN/eval; leave out --run_dir and --name, or use --eval_name")
            self.folder = self.trained.evaluation(options.eval_name or command)
        else:
            self.folder = _folder_of(options)
        self.run_config = self.config_dump

    def before_instantiate_classes(self) -> None:
        """Claim the folder before anything heavy is built."""
        self.identify()
        command, options = str(self.subcommand), self.config[str(self.subcommand)]
        if self.trained is not None:
            self.run_config = {**self.config_dump, "checkpoint": digest_files(self.trained.best())}
        config = self.run_config
        if _rank() != 0:
            self.resuming = self.folder.last.is_file()
            return
        self.claim = self.folder.claim(config, options.overwrite)
        self.resuming = self.claim.known and command == "fit" and self.folder.last.is_file()
        if self.claim.known and self.folder.result.is_file():
            print(f"{self.folder.path} is finished: {self.folder.result} (--overwrite starts afresh)")
            raise SystemExit(0)

    def _warn_about_seeds(self) -> None:
        """A seed set for one part has no effect: seed_everything goes to all.

        Raises:
            UserError: If it is set on the command line, where nobody means another run's default.
        """
        for part in ("model", "data"):
            for name in (f"--{part}.seed", f"--{part}.init_args.seed"):
                if any(int(value) != self.config_dump["seed_everything"] for value in _options(self.argv, name)):
                    raise UserError(f"{name} has no effect, one seed goes to all parts: use --seed_everything")
        for path in _options(self.argv, "--config") + _options(self.argv, "-c"):
            parts = compose(Path(path)) if Path(path).is_file() else {}
            for part in ("model", "data"):
                given = flatten(parts).get(f"{part}.init_args.seed", self.config_dump["seed_everything"])
                if given != self.config_dump["seed_everything"]:
                    warnings.warn(f"{path}: {part}.init_args.seed has no effect, set seed_everything", stacklevel=2)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(one_sentence(str(error))) from error

    def _check_command(self) -> None:
        if self.subcommand == "fit" and isinstance(self.model, Evaluation):
            raise UserError(f"{type(self.model).__name__} is an Evaluation: nothing to fit, use the command test")
        if self.subcommand != "fit" and isinstance(self.model, Method) and self.trained is None:
            raise UserError(f"{type(self.model).__name__} is trained: {self.subcommand} needs --run RUN")
        if missing := [key for key in self.model.needs if key not in self.datamodule.gives]:
            model, data = type(self.model).__name__, type(self.datamodule).__name__
            raise UserError(f"data: {model} needs batches with {', '.join(missing)}, which {data} does not give")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add loggers, checkpoints, progress and results to what the configuration asks for."""
        self._check_command()
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if config.get("logger") not in (None, True, False):
            raise UserError("trainer.logger is set by kvc: use --wandb true to add Weights & Biases")
        if config.get("logger") is False and self.config[str(self.subcommand)].wandb:
            raise UserError("--wandb true has no effect with trainer.logger: false; leave out one of them")
        self.writer = ResultWriter(self.run_config)
        watched = sys.stderr.isatty() and sys.stdout.isatty()
        callbacks: list[Any] = [self.writer, Throughput()]
        if self.claim is not None:
            callbacks.append(_Begun(self.claim))
        if config.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar(leave=True) if watched else LineProgress())
            config["enable_progress_bar"] = watched
        fitting = self.subcommand == "fit"
        config["logger"] = [] if config["logger"] is False else self._loggers()
        config["enable_checkpointing"] = fitting
        config["default_root_dir"] = str(self.folder.path)
        config["use_distributed_sampler"] = False
        config["plugins"] = [*(config.get("plugins") or []), AtomicCheckpointIO()]
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False
        if fitting:
            callbacks += self._checkpoints()
        try:
            return self._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError) as error:
            raise UserError(f"trainer: {one_sentence(str(error))}") from error

    def _loggers(self) -> list[Logger]:
        loggers: list[Logger] = [TensorBoardLogger(str(self.folder.path), name="", version="", default_hp_metric=False)]
        options = self.config[str(self.subcommand)]
        if options.wandb:
            loggers.append(_wandb(self.folder))
        return loggers

    def _checkpoints(self) -> list[Checkpoint]:
        monitor, mode = self.model.monitor
        best = ModelCheckpoint(
            str(self.folder.checkpoints),
            filename="best",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        return [best, LastCheckpoint(self.folder.last, self.config["fit"].save_every)]

    # ------------------------------------------------------------------ commands

    def fit(self, model: Method, datamodule: KvcDataModule, **kwargs: Any) -> None:
        """Train, resuming where there is something to resume, then evaluate the best checkpoint."""
        if not datamodule.has_split("val"):
            raise UserError(
                f"data: {type(datamodule).__name__} has no val split, by which fit chooses the best checkpoint"
            )
        if self.trainer.limit_val_batches == 0:
            raise UserError("trainer.limit_val_batches: 0 leaves nothing to choose the best checkpoint by")
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=self.folder.last if self.resuming else None, **kwargs)
        if self.trainer.received_sigterm or self.trainer.interrupted:
            self.exit_code = 143
            return
        # Data without a test split are judged on the validation split.
        datamodule.eval_split = "test" if datamodule.has_split("test") else "val"
        if datamodule.eval_split == "val":
            warnings.warn("no test split: the numbers are those of the split that chose the checkpoint", stacklevel=1)
        self.writer.command = "fit"
        self.writer.folder = self.folder.evaluation(datamodule.eval_split).path
        self.writer.also = self.folder.path
        if self.trainer.is_global_zero:
            config = {**self.run_config, "checkpoint": digest_files(self.folder.best())}
            write_text(RunFolder(self.writer.folder).config, yaml.safe_dump(config, sort_keys=False))
        self.trainer.test(model, datamodule=datamodule, ckpt_path=self.folder.best(), verbose=False)
        self._say(self.folder)

    def validate(self, model: KvcModule, datamodule: KvcDataModule, **kwargs: Any) -> None:
        """Evaluate the validation split."""
        self._evaluate(model, datamodule, "validate", "val")

    def test(self, model: KvcModule, datamodule: KvcDataModule, **kwargs: Any) -> None:
        """Evaluate the test split."""
        self._evaluate(model, datamodule, "test", "test")

    def predict(self, model: KvcModule, datamodule: KvcDataModule, **kwargs: Any) -> None:
        """Write predictions."""
        self._evaluate(model, datamodule, "predict", "test")

    def _evaluate(self, model: KvcModule, datamodule: KvcDataModule, command: str, split: Any) -> None:
        datamodule.eval_split = split
        if not datamodule.has_split(split):
            raise UserError(f"data: {type(datamodule).__name__} has no {split} split")
        self.writer.command = command
        self.writer.folder = self.folder.path
        checkpoint = self.trained.best() if self.trained is not None else None
        if command == "predict":
            self.trainer.predict(model, datamodule=datamodule, ckpt_path=checkpoint, return_predictions=False)
        else:
            self.trainer.test(model, datamodule=datamodule, ckpt_path=checkpoint, verbose=False)
        self._say(self.folder)

    def _say(self, place: RunFolder) -> None:
        """The lines that a person wants to see when it is over."""
        if not self.trainer.is_global_zero:
            return
        result = place.read_result()
        metrics = result.get("metrics", {})
        headline = f"{result['samples']} predictions"
        for name in (result["headline"] or list(metrics))[:1]:
            value = metrics.get(name, {})
            if "value" in value:
                headline = f"{name} {value['value']:.3f}"
            if "low" in value:
                headline += f" [{value['low']:.3f}, {value['high']:.3f}]"
        files = [self.writer.folder / name for name in (PREDICTIONS, *result["pictures"])] if self.writer.folder else []
        print("\n".join([f"{place.path}: {headline}", *(f"  {path}" for path in files)]), flush=True)


def _rank() -> int:
    """This process among those that were started for the run; 0 before any launch."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


class _Begun(Callback):
    """Keeps the claim on the folder once everything is set up."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.claim.keep()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.claim.keep()

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.claim.keep()


def _seed(value: Any) -> int:
    """One seed for model and data; true and false are not numbers to draw from."""
    if isinstance(value, bool):
        raise UserError("seed_everything: give a number, so that the run can be repeated")
    return int(value)


def _options(argv: list[str], name: str) -> list[str]:
    """Every value of `--name VALUE` or `--name=VALUE`, before parsing."""
    pairs = zip(argv, [*argv[1:], None])
    values = [word.split("=", 1)[1] if word != name else value for word, value in pairs if word.split("=")[0] == name]
    return [value for value in values if value is not None]


def _unlink(config: dict[str, Any]) -> None:
    """Drop the linked seeds, which a configuration file may not set."""
    for part in ("model", "data"):
        config.get(part, {}).get("init_args", {}).pop("seed", None)


@contextmanager
def _composed(argv: list[str]) -> Iterator[list[str]]:
    """The arguments, with each `--config FILE` replaced by a temporary file in which its parts are in their places."""
    with tempfile.TemporaryDirectory(prefix="kvc-") as folder:
        out: list[str] = []
        names: dict[str, str] = {}
        for before, word in zip(["", *argv], argv):
            flag, separator, value = word.partition("=")
            given = value if separator and flag in CONFIG_FLAGS else word if before in CONFIG_FLAGS else None
            if given is not None and Path(given).is_file():
                path = Path(folder) / f"{len(names)}.yaml"
                path.write_text(yaml.safe_dump(compose(Path(given)), sort_keys=False), encoding="utf-8")
                names[str(path)] = given
                word = f"{flag}={path}" if separator and before not in CONFIG_FLAGS else str(path)
            out.append(word)
        try:
            yield out
        except UserError as error:
            message = str(error)
            for temporary, given in names.items():
                message = message.replace(temporary, given)
            raise UserError(message) from error


@contextmanager
def _stored_config(config: dict[str, Any]) -> Iterator[str]:
    """A temporary YAML file with a run's configuration, whose parts are already composed."""
    with tempfile.TemporaryDirectory(prefix="kvc-") as folder:
        path = Path(folder) / CONFIG
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        yield str(path)


def _folder_of(options: Namespace) -> RunFolder:
    if options.run_dir and options.name:
        raise UserError("give --run_dir or --name, not both")
    if options.name and ("/" in options.name or options.name.startswith(".")):
        raise UserError(f"name: '{options.name}' is not a folder name; --run_dir takes a path")
    if not (options.run_dir or options.name):
        raise UserError("give the run a place: --name NAME (a folder under runs/) or --run_dir FOLDER")
    return RunFolder(Path(options.run_dir) if options.run_dir else RUNS / options.name)


def _wandb(folder: RunFolder) -> Logger:
    """W&B logger whose run id lies in the folder: a resumed run resumes there too, a fresh one starts afresh."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError("--wandb needs the extra: pip install -e '.[wandb]'") from None
    from lightning.pytorch.loggers import WandbLogger

    memory = folder.path / "wandb_id"
    if not memory.is_file():
        write_text(memory, uuid.uuid4().hex[:12])
    identifier = memory.read_text(encoding="utf-8").strip()
    return WandbLogger(
        project="kvc", name=folder.path.name, id=identifier, resume="allow", save_dir=str(folder.path), log_model=False
    )


def import_parts() -> None:
    """Import every method and datamodule, so that short class names can be resolved."""
    for package in ("kvc.methods", "kvc.data"):
        root = importlib.import_module(package)
        for module in pkgutil.iter_modules(root.__path__, f"{package}."):
            importlib.import_module(module.name)


def main(argv: list[str]) -> int:
    """Run one of the Trainer commands.

    Args:
        argv: The command and its options.

    Returns:
        Exit code.
    """
    quiet()
    import_parts()
    try:
        return Cli(argv).exit_code
    except SIGTERMException:
        # It is a SystemExit without a code, which would look like success.
        return 143


def quiet() -> None:
    """Silence advice that does not apply here, so that warnings which remain are worth reading."""
    import logging

    import transformers

    transformers.utils.logging.disable_progress_bar()
    for pattern in (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*`is_gradient_checkpointing` is deprecated.*",
        r".*Found \d+ module\(s\) in eval mode.*",
        r".*LightningCLI's args parameter.*",
        r".*number of training batches \(\d+\) is smaller than the logging interval.*",
        r".*you defined a `validation_step` but have no `val_dataloader`.*",
        r".*the dataloaders? state.*",
        r".*set_vital.*",
        # What is logged at the end of a validation has been summed over ranks already.
        r".*It is recommended to use `self.log.*sync_dist=True.*",
        r".*Be aware that when using `ckpt_path`.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
