"""`python -m kvc cluster`: questions grouped by what they ask, and the nearest neighbours of a new one."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from kvc.commands import CommandParser
from kvc.commands.annotate_openai import positive
from kvc.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kvc.data.clustering.embedder import Embedder
    from kvc.data.clustering.query import ClusterQuery

TFIDF = "tfidf"
EPILOG = """\
questions: a JSON list or JSONL file, or hub:owner/name[:config], whose records have question, solution and answer
(LIMO), problem, reasoning and solution, or question and answer (GSM8K).

embeddings:
  tfidf   words weighted by rarity, reduced by SVD; works without a network; kept in the folder
  MODEL   Hub id or folder of a sentence-transformers model that needs no code of its own; needs
          pip install -e '.[embeddings]'

examples:
  python -m kvc cluster gsm8k.jsonl --output clusters/gsm8k
  python -m kvc cluster hub:GAIR/LIMO                                   (into clusters/LIMO)
  python -m kvc cluster hub:GAIR/LIMO --embeddings sentence-transformers/all-MiniLM-L6-v2 --overwrite
  python -m kvc cluster --output clusters/gsm8k --similar "How many eggs does Janet sell?" --neighbours 5
  python -m kvc cluster --output clusters/gsm8k --similar "How many eggs does Janet sell?" --save nearest.json
  tensorboard --logdir clusters/gsm8k/projector

data_k16.json and data_k40.json (one question a cluster) and nearest.json are documents for `python -m kvc study`.
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    result = CommandParser(
        prog="python -m kvc cluster",
        description="Group questions by k-means over their embeddings, and find the nearest neighbours of a question.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("source", metavar="QUESTIONS_FILE", nargs="?", help="file or hub:owner/name; none: search --output")
    add("--output", metavar="DIR", type=Path, help="folder of the clusters; default: clusters/NAME_OF_THE_FILE")
    add("--split", metavar="NAME", help="split of a Hub dataset (default: train)")
    add("--embeddings", metavar="tfidf|MODEL", help="what turns a question into a vector (default: tfidf)")
    add("--prompt", metavar="NAME", help="prompt of the sentence-transformers model")
    add("--dimensions", metavar="N", type=positive, help="length of a TF-IDF vector (default: 128)")
    add("--k", metavar="K", type=positive, nargs="+", help="numbers of clusters (default: 16 40)")
    add("--seed", metavar="N", type=int, help="of SVD and k-means (default: 42)")
    add("--overwrite", action="store_true", help="replace FILE, and clusters of others in DIR")
    search = result.add_argument_group("search")
    search.add_argument("--similar", metavar="QUESTION", help="print its nearest neighbours and its cluster for each k")
    search.add_argument("--neighbours", metavar="N", type=positive, help="how many (default: 20)")
    search.add_argument(
        "--save", metavar="FILE", type=Path, help="also write them as documents to study, nearest first"
    )
    return result


def main(argv: list[str]) -> int:
    """Cluster, search, or both.

    Args:
        argv: Arguments after `cluster`.

    Returns:
        0.

    Raises:
        UserError: If the questions, the model or the folder cannot be used; the folder is as it was then.
    """
    options = parser().parse_args(argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.similar is None:
        for name in ("neighbours", "save"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} needs --similar QUESTION")
        if options.source is None:
            raise UserError("give QUESTIONS_FILE to cluster, or --output DIR and --similar QUESTION to search")
    if options.save is not None and options.save.exists() and not options.overwrite:
        raise UserError(f"--save {options.save}: exists, add --overwrite to replace it")
    try:
        output = _search_folder(options) if options.source is None else _cluster(options, console)
        if options.similar is not None:
            _search(options, output, console)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'the clusters'}: {error.strerror}") from error
    return 0


def _search_folder(options: argparse.Namespace) -> Path:
    for name in ("split", "embeddings", "prompt", "dimensions", "k", "seed"):
        if getattr(options, name) is not None:
            warnings.warn(f"--{name} has no effect without QUESTIONS_FILE", stacklevel=2)
    if options.output is None:
        raise UserError("--similar needs QUESTIONS_FILE or --output DIR")
    return Path(options.output)


def _cluster(options: argparse.Namespace, console: "Console") -> Path:
    """Make the clusters, or find them made; returns their folder."""
    from kvc.data.clustering.build import build, check_numbers, identity_of
    from kvc.data.clustering.folder import check_output
    from kvc.data.clustering.items import load_items
    from kvc.data.clustering.kmeans import KMeansSettings
    from kvc.runs import lock_folder

    source = options.source
    output = Path(options.output or Path("clusters") / _name(source))
    ks = options.k or [16, 40]
    items = load_items(source, options.split or "train")
    check_numbers(items, ks)
    embedder = _embedder(options)
    settings = KMeansSettings() if options.seed is None else KMeansSettings(options.seed)
    identity = identity_of(items, embedder, ks, settings)
    lock = lock_folder(output)
    try:
        before = check_output(output)
        changed = [] if before is None else [key for key, value in identity.items() if before.get(key) != value]
        if before is not None and not changed:
            console.print(f"{output} holds these clusters already")
            return output
        if changed and not options.overwrite:
            raise UserError(
                f"--output {output} holds other clusters ({', '.join(changed)} differ): choose another --output, "
                "or add --overwrite to replace them"
            )
        unsolved = sum(not (item.reasoning and item.solution) for item in items)
        build(output, source, items, embedder, ks, settings, console.print)
    finally:
        lock.close()
    if unsolved:
        console.print(f"{unsolved} of {len(items)} questions have no reasoning or no solution")
    console.print(f"wrote {output}; tensorboard --logdir {output / 'projector'} shows the questions")
    return output


def _name(source: str) -> str:
    """A folder's name: that of the Hub dataset and its configuration, or that of the file without its ending."""
    if source.startswith("hub:"):
        return source.rpartition("/")[2].replace(":", "-")
    return Path(source).stem


def _embedder(options: argparse.Namespace) -> "Embedder":
    from kvc.data.clustering.sentences import SentenceEmbedder
    from kvc.data.clustering.tfidf import TfidfSvd

    given = {key: value for key in ("dimensions", "seed") if (value := getattr(options, key)) is not None}
    if options.embeddings in (None, TFIDF):
        if options.prompt is not None:
            raise UserError("--prompt needs --embeddings MODEL")
        return TfidfSvd(**given)
    if options.dimensions is not None:
        raise UserError("--dimensions is for --embeddings tfidf: a model has a size of its own")
    return SentenceEmbedder(options.embeddings, options.prompt)


def _search(options: argparse.Namespace, output: Path, console: "Console") -> None:
    from kvc.data.clustering.folder import read_manifest, write_documents
    from kvc.data.clustering.query import ClusterQuery

    queries = [ClusterQuery(output, k) for k in read_manifest(output)["k"]]
    found = queries[0].most_similar(options.similar, options.neighbours or 20)
    console.print(f"most similar of {len(queries[0].items)} questions (cosine):")
    for neighbour in found:
        text = " ".join(neighbour.problem.split())
        console.print(f"  {neighbour.similarity:.3f}  [{neighbour.index}] {text[:160]}{'…' * (len(text) > 160)}")
    for query in queries:
        console.print(_place(query, options.similar))
    if options.save is not None:
        write_documents(options.save, [neighbour.item for neighbour in found])
        console.print(f"wrote {options.save}")


def _place(query: "ClusterQuery", question: str) -> str:
    cluster, samples = query.find_closest_cluster(question)
    return f"k = {query.k_value}: cluster {cluster} of {len(samples)} questions"
