"""Base of every DataModule: an order fixed by seed and epoch, exact on any number of ranks, resumable mid-epoch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from kvc.core import seeds
from kvc.errors import UserError

Split = Literal["train", "val", "test"]


class KvcDataModule(LightningDataModule):
    """A subclass writes `dataset(split)`, `collate(split)` and `data_hash()`.

    Training order is a permutation drawn from (seed, epoch), dealt out to the ranks row by row, so that W ranks with
    batch B see the same rows in the same step as one process with batch W x B. Evaluation splits are dealt out without
    padding: each row is counted once on any number of ranks. The keys given to a dataset are `(epoch, index)`, so a
    draw that must be made anew each epoch is a pure function of its key, whichever worker makes it.

    Args:
        batch_size: Rows of a training batch on each rank; None where the dataset's items are whole batches.
        eval_batch_size: Rows of an evaluation batch; the training batch size if None.
        num_workers: Loader processes; results do not depend on it.
        shuffle: Draw a new training order each epoch; false keeps the order of the data.
        seed: Seed of order and draws.
    """

    gives: ClassVar[tuple[str, ...]] = ()
    """Keys of its batches."""

    def __init__(
        self,
        batch_size: int | None = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1, got {batch_size}")
        if eval_batch_size is not None and eval_batch_size < 1:
            raise UserError(f"data.eval_batch_size must be at least 1, got {eval_batch_size}")
        if num_workers < 0:
            raise UserError(f"data.num_workers must not be negative, got {num_workers}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.seed = seed
        self.eval_split: Split = "test"

    # ------------------------------------------------------------------ what a datamodule writes

    def dataset(self, split: Split) -> Any:
        """Map-style data of a split: has a length, takes `(epoch, index)`."""
        raise NotImplementedError(f"{type(self).__name__} has no dataset")

    def has_split(self, split: Split) -> bool:
        """Whether the split exists and holds at least one row."""
        return len(self.dataset(split)) > 0

    def collate(self, split: Split) -> Callable[[list[Any]], Any] | None:
        """Turns items into a batch; None keeps torch's default."""
        return None

    def data_hash(self) -> str:
        """A name of the contents of all splits."""
        raise NotImplementedError(f"{type(self).__name__} does not name its contents")

    def describe(self) -> dict[str, Any]:
        """Where the data came from, for `result.json`."""
        return {}

    def stages(self) -> Sequence[int]:
        """Rows of the parts of the training split that come one after the other, each in an order of its own."""
        return [len(self.dataset("train"))]

    # ------------------------------------------------------------------ loaders

    def train_batches(self) -> int:
        """Number of training batches of one rank in one epoch."""
        rows = len(self._sampler("train"))
        return rows if self.batch_size is None else -(-rows // self.batch_size)

    def train_dataloader(self) -> StatefulDataLoader:
        """Loader of the training split for this rank."""
        return self._loader("train")

    def val_dataloader(self) -> StatefulDataLoader:
        """Loader of the validation split for this rank."""
        return self._loader("val")

    def test_dataloader(self) -> StatefulDataLoader:
        """Loader of `eval_split` for this rank."""
        return self._loader(self.eval_split)

    def predict_dataloader(self) -> StatefulDataLoader:
        """Loader of `eval_split` for this rank."""
        return self._loader(self.eval_split)

    def _sampler(self, split: Split) -> "DealtSampler":
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        train = split == "train"
        rows = len(self.dataset(split))
        if 0 < rows < world:
            raise UserError(f"trainer.devices: the {split} split has {rows} rows, fewer than the {world} ranks")
        stages = self.stages() if train else [rows]
        sampler = DealtSampler(
            stages, self.seed, train and self.shuffle, self._group(rows, world) if train else 1, world, rank
        )
        if train and trainer is not None:
            # A resumed run draws its first batch before Lightning calls set_epoch.
            sampler.set_epoch(trainer.current_epoch)
        return sampler

    def _group(self, rows: int, world: int) -> int:
        """Training rows of which an epoch uses a multiple.

        An optimiser step weighs alike however many batches it accumulates, so the few that an epoch would leave over
        are left out; the next epoch shuffles anew.
        """
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        step = world if accumulated == 1 else world * accumulated * (self.batch_size or 1)
        return step if rows >= step else world

    def _loader(self, split: Split) -> StatefulDataLoader:
        return StatefulDataLoader(
            self.dataset(split),
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            sampler=self._sampler(split),
            collate_fn=self.collate(split),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Without a generator of its own, making an iterator would draw from the global state that dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=torch.cuda.is_available(),
        )


def check_split(split: tuple[float, float, float]) -> None:
    """Refuse shares of train, val and test that are none.

    Raises:
        UserError: If one is negative, or they do not add up to 1.
    """
    if abs(sum(split) - 1) > 1e-6 or min(split) < 0:
        raise UserError(f"data.split must be three shares that add up to 1, got {list(split)}")


class Rows:
    """A list as a dataset.

    Args:
        rows: Its rows.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.rows[key[1]]


class DealtSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` for one of `world` ranks: row i of the epoch's order goes to rank i mod world.

    Args:
        stages: Number of rows of each part; parts keep their order.
        seed: Seed of the order.
        shuffle: Draw a permutation of each part from (seed, epoch); else keep the order.
        multiple: Use so many rows of an epoch's order that this number divides them; training needs one of `world`,
            so that no rank waits for another.
        world: Number of ranks.
        rank: This rank.
    """

    def __init__(
        self, stages: Sequence[int], seed: int, shuffle: bool, multiple: int = 1, world: int = 1, rank: int = 0
    ) -> None:
        self.stages, self.seed, self.shuffle, self.world, self.rank = stages, seed, shuffle, world, rank
        self.used = sum(stages) - sum(stages) % multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order: Sequence[int] = range(sum(self.stages))
        if self.shuffle:
            generator = seeds.generator(self.seed, self.epoch)
            parts = [torch.randperm(rows, generator=generator) for rows in self.stages]
            starts = [0, *accumulate(self.stages)]
            order = torch.cat([part + start for part, start in zip(parts, starts)]).tolist()
        for position in range(self.rank, self.used, self.world):
            yield self.epoch, order[position]
