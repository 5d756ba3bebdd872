"""Several question sets as one, and the sets beside SQuAD."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
from transformers import AutoTokenizer

from kvc.core.datamodule import KvcDataModule
from kvc.data.mixture import TaskMixture
from kvc.data.squad import Squad
from kvc.data.squad.hotpot import HotpotQa, load_hotpot
from kvc.data.synthetic.tasks import TASKS
from kvc.data.tasks import SolvedProblems, SyntheticTasks
from kvc.errors import UserError

ROOT = Path(__file__).parents[2]
HOTPOT, GSM8K = (str(ROOT / "data" / "samples" / name) for name in ("hotpot.json", "gsm8k.jsonl"))


def ready(data: KvcDataModule) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-lm")
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer))
    data.setup("fit")
    return data


def tasks() -> dict[str, KvcDataModule]:
    return {
        "squad": Squad(counts=(90, 3, 3), facts=(2, 5)),
        "study": SyntheticTasks(("study",), (10, 2, 2)),
        "hotpot": HotpotQa(HOTPOT, split=(0.5, 0.0, 0.5)),
    }


def text(data: Any, item: Any, *parts: str) -> str:
    return "".join(data.tokenizer.decode(item[part]) for part in parts)


def test_rows_are_drawn_by_the_power_of_sizes() -> None:
    data = ready(TaskMixture(tasks(), alpha=0.5, rows=2000))
    rows = data.dataset("train")
    assert len(rows) == 2000
    drawn = [rows[0, number]["questions"].group for number in range(600)]
    weights = {"squad": 90**0.5, "study": 10**0.5, "hotpot": 1.0}
    for name, weight in weights.items():
        assert drawn.count(name) / 600 == pytest.approx(weight / sum(weights.values()), abs=0.06), name
    assert data.shares([90, 10]).tolist() == pytest.approx([0.75, 0.25])
    assert TaskMixture(tasks(), alpha=0).shares([90, 10]).tolist() == [0.5, 0.5]
    assert len(ready(TaskMixture(tasks())).dataset("train")) == 101


def test_draws_are_a_function_of_seed_epoch_and_number() -> None:
    one, other = (ready(TaskMixture(tasks(), seed=seed)).dataset("train") for seed in (1, 1))

    def said(rows: Any, epoch: int) -> list[str]:
        return [rows[epoch, number]["questions"].prompt for number in range(20)]

    assert said(one, 0) == said(other, 0)
    assert said(one, 0) != said(one, 1)
    assert said(one, 0) != said(ready(TaskMixture(tasks(), seed=2)).dataset("train"), 0)


def test_evaluations_hold_every_row_once() -> None:
    data = ready(TaskMixture(tasks()))
    rows = data.dataset("test")
    assert len(rows) == 3 + 2 + 1
    items = [rows[0, number] for number in range(len(rows))]
    assert [int(item["id"]) for item in items] == list(range(6))
    assert [item["questions"].group for item in items] == ["squad"] * 3 + ["study"] * 2 + ["hotpot"]
    assert [item["questions"].id for item in items] == list(range(6))
    assert len(data.dataset("val")) == 5
    batch = data.collate("test")(items)
    assert set(data.gives) == set(batch)
    for item in items:
        question = item["questions"]
        assert question.score(question.gold).em
        assert not question.score("nonsense").em
        assert pickle.loads(pickle.dumps(question)).score(question.gold).em


def test_the_hash_tells_tasks_and_shares_apart() -> None:
    hashes = {
        ready(TaskMixture(tasks(), alpha=1)).data_hash(),
        ready(TaskMixture(tasks(), alpha=0.5)).data_hash(),
        ready(TaskMixture({"squad": tasks()["squad"]})).data_hash(),
    }
    assert len(hashes) == 3


def test_bad_mixtures_are_refused() -> None:
    from kvc.data.language import SyntheticText

    with pytest.raises(UserError, match=r"data\.tasks: there is none"):
        TaskMixture({})
    with pytest.raises(UserError, match=r"data\.tasks\.text: SyntheticText gives no 'answer_ids'"):
        TaskMixture({"text": SyntheticText()})
    for settings in ({"alpha": -1}, {"rows": 0}):
        with pytest.raises(UserError, match=f"data.{next(iter(settings))}"):
            TaskMixture(tasks(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [name for name, kind in TASKS.items() if kind.grade])
def test_a_synthetic_problem_is_the_plain_layout(task: str) -> None:
    data = ready(SyntheticTasks((task,), (3, 0, 3)))
    for split in ("train", "test"):
        rows = data.dataset(split)
        for number in range(3):
            item = rows[0, number]
            question = item["questions"]
            assert text(data, item, "head", "context", "tail") == data.tokenizer.bos_token + question.prompt
            assert question.score(data.tokenizer.decode(item["answer"], skip_special_tokens=True)).em
            assert len(item["context"])
            assert len(item["tail"])
    assert not data.has_split("val")
    with pytest.raises(UserError, match=r"data\.tasks: 'dialogue' is not one of"):
        SyntheticTasks(("dialogue",))


def test_paragraphs_of_hotpot(tmp_path: Path) -> None:
    first, second = load_hotpot(HOTPOT)
    assert first.context.startswith("Red bell: The red bell belongs to Tom. It hangs in the hall.\nAnn: Ann lives")
    assert first.context[first.starts[0] :].startswith("Oslo")
    assert second.starts == (-1,)
    assert "Ann" not in load_hotpot(HOTPOT, "supporting")[0].context
    rows = json.loads(Path(HOTPOT).read_text())
    hub = [
        {
            "id": row["_id"],
            **{key: row[key] for key in ("question", "answer")},
            "context": {"title": [p[0] for p in row["context"]], "sentences": [p[1] for p in row["context"]]},
            "supporting_facts": {"title": [fact[0] for fact in row["supporting_facts"]], "sent_id": [0, 0]},
        }
        for row in rows
    ]
    (tmp_path / "hub.json").write_text(json.dumps(hub))
    for paragraphs in ("all", "supporting"):
        assert load_hotpot(str(tmp_path / "hub.json"), paragraphs) == load_hotpot(HOTPOT, paragraphs)  # type: ignore[arg-type]


def test_an_answer_that_stands_nowhere_has_no_span() -> None:
    data = ready(HotpotQa(HOTPOT, split=(1, 0, 0), context_length=8))
    rows = data.dataset("train")
    items = {rows[0, number]["questions"].gold: rows[0, number] for number in range(2)}
    first, last = items["Oslo"]["span"].tolist()
    assert data.tokenizer.decode(items["Oslo"]["context"][first:last]).strip(" .") == "Oslo"
    assert items["no"]["span"].tolist() == [-1, -1]
    assert len(items["no"]["context"]) == 8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": None}, "record 1: key 'answer' is missing"),
        ({"context": []}, "record 1: key 'context' is missing"),
        ({"context": [["A", "text"]]}, r"record 1: context\[0\]: expected a title and a list"),
        ({"supporting_facts": 3}, "record 1: key 'supporting_facts'"),
        ({"supporting_facts": [["Nobody", 0]]}, "record 1: no paragraph has a title"),
        ({"_id": "h2"}, "record 2: two questions have the id 'h2'"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    rows = json.loads(Path(HOTPOT).read_text())
    rows[0] |= change
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=sentence):
        load_hotpot(str(tmp_path / "bad.json"), "supporting")


def test_word_problems_come_after_solved_ones(tmp_path: Path) -> None:
    path = tmp_path / "solved.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"Q{i}?", "answer": f"It is {i}.\n#### {i}"}) for i in range(20)))
    data = ready(SolvedProblems(str(path), shots=3, split=(0.6, 0.2, 0.2)))
    held_out = {question for split in ("val", "test") for question, _ in data.solved[split]}
    for split in ("train", "test"):
        for problem in data.problems(split):
            assert problem.context.count("Question:") == 3
            own = problem.tail.split("Question: ")[1].split("\n")[0]
            assert f"Question: {own}\n" not in problem.context
            assert not [question for question in held_out if f"Question: {question}\n" in problem.context]
            assert problem.right(problem.answer)
            assert problem.right(f"so #### {problem.gold}\n\nQuestion: next\nAnswer: #### 77")
            assert not problem.right("#### 77")
    with pytest.raises(UserError, match=r"data\.shots: .* too few for 12"):
        ready(SolvedProblems(str(path), shots=12, split=(0.6, 0.2, 0.2))).problems("train")
    path.write_text(json.dumps({"question": "Q?", "answer": "7"}))
    with pytest.raises(UserError, match="line 1: the answer has no final answer after ####"):
        SolvedProblems(str(path)).problems("train")
    assert len(SolvedProblems(GSM8K, shots=1, split=(1, 0, 0)).problems("train")) == 2


def test_a_compressor_trains_on_a_mixture(tiny_folder: Path, tmp_path: Path) -> None:
    """Also from a configuration file, with parts of parts."""
    parts = {
        "squad": {"class_path": "kvc.data.squad.Squad", "init_args": {"counts": [8, 2, 2], "facts": [2, 4]}},
        "study": {
            "class_path": "kvc.data.tasks.SyntheticTasks",
            "init_args": {"tasks": ["study"], "counts": [4, 2, 2]},
        },
        "hotpot": {"class_path": "kvc.data.squad.hotpot.HotpotQa", "init_args": {"path": HOTPOT, "split": [1, 0, 0]}},
    }
    config = {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {
            "class_path": "kvc.methods.squad.ContextCompressor",
            "init_args": {"backbone": {"pretrained": str(tiny_folder)}, "max_new_tokens": 3},
        },
        "data": {"class_path": "kvc.data.mixture.TaskMixture", "init_args": {"tasks": parts, "batch_size": 4}},
    }
    assert cases.fit(config, tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"f1_squad", "f1_study", "em_study"} <= result["metrics"].keys()
    assert result["samples"] == 4
