"""Instructions, inputs and outputs, in the layout of Alpaca (and of Alpaca+, the data of the gist paper)."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from kvc.core import seeds
from kvc.core.datamodule import KvcDataModule, Split, check_split
from kvc.core.files import digest
from kvc.data.parts import KEYS, PARTS, collate_parts
from kvc.data.rouge import Rouge, rouge
from kvc.data.traces import HUB, hub_records, read_records
from kvc.errors import UserError

SPLITS: tuple[Split, Split, Split] = ("train", "val", "test")


class Instruction(NamedTuple):
    """One record.

    Attributes:
        instruction: What is to be done; what is compressed.
        input: What it is to be done with; may be empty.
        output: The right answer.
        group: Name of the set it comes from.
    """

    instruction: str
    input: str
    output: str
    group: str

    @property
    def context(self) -> str:
        """The instruction as it is shown."""
        return f"Instruction: {self.instruction}"

    @property
    def tail(self) -> str:
        """What stands between the instruction and the answer."""
        return f"\nInput: {self.input}\nOutput:" if self.input else "\nOutput:"


class InstructionQuestion(NamedTuple):
    """An instruction as a decoding evaluation sees it.

    Attributes:
        id: Its number in the split.
        record: The record.
        stemmer: Compare stems of words.
    """

    id: int
    record: Instruction
    stemmer: bool

    @property
    def group(self) -> str:
        """Name of the set it comes from, such as `seen`, `unseen`, `human`."""
        return self.record.group

    @property
    def prompt(self) -> str:
        """Everything before the answer, without BOS."""
        return self.record.context + self.record.tail

    @property
    def bare_prompt(self) -> str:
        """The prompt without the instruction."""
        return self.record.tail.lstrip()

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.record.output

    def score(self, completion: str) -> Rouge:
        """ROUGE-1, 2 and L against the right answer."""
        return rouge(completion.strip(), self.record.output, self.stemmer)


class Instructions(KvcDataModule):
    """Instruction tuning: JSON lists or JSONL files of `instruction`, `input` and `output`.

    Batch: see `kvc.data.parts.collate_parts`. The head is BOS, the context `Instruction: ...`, the tail `Input: ...`
    and `Output:`; the answer ends with EOS. `span` is -1.

    Args:
        path: Training file, or `hub:owner/name` (`hub:tatsu-lab/alpaca`).
        eval_paths: Test files by name (`{seen: FILE, unseen: FILE, human: FILE}`); the test share of `split` then
            trains.
        split: Shares of the training file for train, val and test.
        split_seed: Seed of the split.
        max_length: Most tokens of a training sequence; longer answers are cut, and records whose prompt alone is as
            long are dropped and counted. The paper takes 512.
        stemmer: ROUGE on stems of words, as the paper reports it; needs the package `nltk`.
        batch_size: Records of a training batch on each rank.
        eval_batch_size: Records of an evaluation batch.
        num_workers: Loader processes.
        seed: Seed of the order.
    """

    gives: ClassVar[tuple[str, ...]] = KEYS

    def __init__(
        self,
        path: str,
        eval_paths: dict[str, str] | None = None,
        split: tuple[float, float, float] = (0.98, 0.01, 0.01),
        split_seed: int = seeds.DEFAULT_SEED,
        max_length: int = 512,
        stemmer: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = seeds.DEFAULT_SEED,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle=True, seed=seed)
        check_split(split)
        if max_length < 2:
            raise UserError(f"data.max_length must be at least 2, got {max_length}")
        if stemmer:
            rouge("", "", stemmer)  # refuses here, not after the training
        self.path, self.eval_paths, self.split, self.split_seed = path, eval_paths or {}, split, split_seed
        self.max_length, self.stemmer = max_length, stemmer
        self.dropped = 0
        self.tokenizer: Any = None
        self._rows: dict[Split, list[dict[str, torch.Tensor]]] = {}

    @functools.cached_property
    def parts(self) -> dict[Split, list[Instruction]]:
        """Records by split.

        Raises:
            UserError: A source is missing or malformed; names the file, the place in it and the key.
        """
        records = load_instructions(self.path)
        order = torch.randperm(len(records), generator=seeds.generator(self.split_seed)).tolist()
        first, second = (round(len(records) * sum(self.split[:n])) for n in (1, 2))
        cuts = (order[:first], order[first:second], order[second:])
        train, val, test = ([records[i] for i in part] for part in cuts)
        if self.eval_paths:
            train += test
            test = [record for name, path in self.eval_paths.items() for record in load_instructions(path, name)]
        return {"train": train, "val": val, "test": test}

    def setup(self, stage: str) -> None:
        """Take the tokenizer of the method's base model."""
        self.tokenizer = self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    def rows(self, split: Split) -> list[dict[str, torch.Tensor]]:
        """The records of a split as items."""
        if split not in self._rows:
            found = [self._item(number, record) for number, record in enumerate(self.parts[split])]
            self._rows[split] = self._fitting(found) if split == "train" else found
        return self._rows[split]

    def _item(self, number: int, record: Instruction) -> dict[str, Any]:
        def ids(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        bos = self.tokenizer.bos_token_id
        answer = [*ids(f" {record.output}"), self.tokenizer.eos_token_id]
        parts = ([] if bos is None else [bos], ids(record.context), ids(record.tail), answer)
        item: dict[str, Any] = {part: torch.tensor(found, dtype=torch.int64) for part, found in zip(PARTS, parts)}
        item["id"], item["group"], item["span"] = torch.tensor(number), torch.tensor(number), torch.tensor([-1, -1])
        item["questions"] = InstructionQuestion(number, record, self.stemmer)
        return item

    def _fitting(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        fitting = []
        for item in items:
            left = self.max_length - sum(len(item[part]) for part in PARTS[:3])
            if left > 0:
                fitting.append({**item, "answer": item["answer"][:left]})
        self.dropped = len(items) - len(fitting)
        if not fitting:
            raise UserError(f"data.max_length: no instruction of {self.path} is shorter than {self.max_length} tokens")
        return fitting

    def has_split(self, split: Split) -> bool:
        """Whether the split holds a record."""
        return len(self.parts[split]) > 0

    def dataset(self, split: Split) -> Any:
        """Records of a split."""
        return _Items(self, split)

    def collate(self, split: Split) -> Callable[[list[Any]], Any]:
        """Pads on the right."""
        return collate_parts

    def data_hash(self) -> str:
        """Name of the records, their split and the longest sequence."""
        return digest([self.parts, self.max_length])

    def describe(self) -> dict[str, Any]:
        """Source, sizes and what was dropped."""
        return {
            "source": self.path,
            "splits": {name: len(self.parts[name]) for name in SPLITS},
            "dropped": {"prompt_too_long": self.dropped} if self.dropped else {},
        }


class _Items:
    def __init__(self, data: Instructions, split: Split) -> None:
        self.data, self.split = data, split

    def __len__(self) -> int:
        return len(self.data.rows(self.split))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.data.rows(self.split)[key[1]]


def load_instructions(source: str, group: str = "instructions") -> list[Instruction]:
    """Read records.

    Args:
        source: JSON list, JSONL file, or `hub:owner/name`.
        group: Name of the set.

    Raises:
        UserError: The source is missing or malformed; names the file, the place in it and the key.
    """
    if source.startswith(HUB):
        rows = hub_records(source.removeprefix(HUB), "train")
    else:
        rows = read_records(Path(source))
    return [_record(where, row, group) for where, row in rows]


def _record(where: str, row: dict[str, Any], group: str) -> Instruction:
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: key {key!r} is missing or no text")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise UserError(f"{where}: key 'input' is no text")
    return Instruction(row["instruction"].strip(), given.strip(), row["output"].strip(), group)
