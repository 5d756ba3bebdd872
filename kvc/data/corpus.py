"""Where long documents come from: text and JSONL files, folders, Hub data sets, sets that are tokenised already."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvc.core.datamodule import Split
from kvc.core.files import digest, digest_files
from kvc.data.traces import HUB, read_records
from kvc.errors import UserError

TOKENS = "input_ids"
RECORDS = (".jsonl", ".json")
TEXTS = (".txt", ".md", *RECORDS)
NAMES: dict[str, Split] = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}
"""Names that data sets give their splits."""


class Corpus(NamedTuple):
    """Documents by split.

    Attributes:
        parts: A source without splits is all `train`. Texts, or mappings with `input_ids`.
        tokenised: Whether the documents are token ids.
        hash: A name of the contents.
    """

    parts: dict[Split, Sequence[Any]]
    tokenised: bool
    hash: str


def load_corpus(source: str, key: str = "text") -> Corpus:
    """Find out what `source` is and open it.

    Args:
        source: A text file (one document), a JSON list or JSONL file (one document a record), a folder of such files, a
            folder written by `datasets.save_to_disk`, or `hub:owner/name[:config]`.
        key: Key of the text in records; records with the key `input_ids` are token ids.

    Raises:
        UserError: If it cannot be read or holds no documents.
    """
    if source.startswith(HUB):
        return _from_datasets(source, _hub(source), key)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"data.path: there is no file or folder {path}")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_datasets(source, _saved(path), key)
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXTS) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.path: the folder {path} holds no {', '.join(TEXTS)} file and no saved data set")
    documents = [document for file in files for document in _documents(file, key)]
    tokenised = [not isinstance(document, str) for document in documents]
    if any(tokenised) != all(tokenised):
        raise UserError(f"data.path: {path} mixes texts with records of {TOKENS}")
    return Corpus({"train": documents}, all(tokenised), digest_files(*files))


def _documents(file: Path, key: str) -> Iterator[Any]:
    if file.suffix not in RECORDS:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(f"{file}: {reason}") from None
        if not text.strip():
            raise UserError(f"{file}: is empty")
        yield text
        return
    for where, row in read_records(file):
        if TOKENS in row:
            yield row
        elif isinstance(row.get(key), str):
            yield row[key]
        else:
            raise UserError(f"{where}: neither {key!r} (text) nor {TOKENS!r}; name the key by data.text_key")


def _hub(source: str) -> Any:
    import datasets

    repository, _, config = source.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # the library raises a dozen kinds, all of which mean: not available
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"data.path: {source} cannot be loaded: {reason}") from None


def _saved(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"data.path: {path} cannot be loaded: {reason}") from None


def _from_datasets(source: str, loaded: Any, key: str) -> Corpus:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    known = {NAMES[name]: split for name, split in splits.items() if name in NAMES and len(split)}
    if not known:
        raise UserError(f"data.path: {source} has no rows in a split named {', '.join(NAMES)}, but {', '.join(splits)}")
    columns = next(iter(known.values())).column_names
    tokenised = TOKENS in columns
    if not tokenised and key not in columns:
        raise UserError(
            f"data.text_key: {source} has neither the column {key!r} nor {TOKENS!r}, but {', '.join(columns)}"
        )
    name = digest(
        [source if source.startswith(HUB) else "", {split: rows._fingerprint for split, rows in known.items()}]
    )
    return Corpus({split: rows if tokenised else rows[key] for split, rows in known.items()}, tokenised, name)
