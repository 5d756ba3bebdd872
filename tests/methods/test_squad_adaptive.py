"""Which budget a text needs: labels, cascade, calibration, and the method on top of a compressor."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

from kvc.__main__ import main
from kvc.core.build import build_model
from kvc.errors import UserError
from kvc.methods.squad.adaptive import (
    BudgetPredictor,
    balanced_loss,
    calibrate,
    cascade,
    pick,
    smallest_sufficient,
)
from kvc.methods.squad.adaptive_budget import AdaptiveBudget
from kvc.methods.squad.adaptive_scoring import summarize

SQUAD = "kvc.methods.squad"
RATIOS = [{"class_path": f"{SQUAD}.FixedRatio", "init_args": {"ratio": ratio}} for ratio in (16, 4)]
DATA = {"class_path": "kvc.data.squad.Squad", "init_args": {"counts": [12, 4, 6], "facts": [2, 6], "batch_size": 4}}


def test_labels_are_the_smallest_budgets_that_do() -> None:
    scores = torch.tensor([[0.2, 0.9, 1.0], [0.5, 0.5, 0.5], [0.0, 0.3, 0.8], [1.0, 0.0, 0.2], [0.9, 0.1, 1.0]])
    assert smallest_sufficient(scores).tolist() == [1, 0, 2, 0, 0]
    assert smallest_sufficient(scores, 0.0).tolist() == [2, 0, 2, 0, 2]


def test_the_cascade_stops_at_the_first_confident_answer() -> None:
    confidence = torch.tensor([[-0.1, -0.5, -0.2], [-2.0, -0.5, -0.1], [-2.0, -3.0, -4.0]])
    before = confidence.clone()
    assert cascade(confidence, -1.0).tolist() == [0, 1, 2]
    assert cascade(confidence, -0.3).tolist() == [0, 2, 2]
    assert cascade(confidence, float("inf")).tolist() == [2, 2, 2]
    assert torch.equal(confidence, before)


def test_calibration_finds_the_cheapest_threshold_that_loses_nothing() -> None:
    """Answers of the small budget are right where they are confident."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(200, generator=generator)
    confidence = torch.stack([sure.log(), torch.zeros(200)], dim=1)
    scores = torch.stack([(sure > 0.4).float(), torch.ones(200)], dim=1)
    costs = torch.tensor([[4.0, 32.0]]).expand(200, -1)
    threshold = calibrate(confidence, scores, costs, loss=0.0)
    chosen = cascade(confidence, threshold)
    assert torch.equal(chosen == 0, sure > 0.4)
    assert float(pick(scores, chosen).mean()) == 1
    cheaper = calibrate(confidence, scores, costs, loss=0.1)
    assert cheaper < threshold
    assert float(pick(scores, cascade(confidence, cheaper)).mean()) >= 0.9 - 1e-6
    useless = calibrate(torch.rand(200, 2, generator=generator), 1 - scores.flip(1), costs, loss=-1.0)
    assert useless == float("inf")


def test_budgets_that_occur_weigh_alike() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 0, 0, 0, 2])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert float(balanced_loss(logits, labels)) == pytest.approx(float((each[:5].mean() + each[5]) / 2), rel=1e-5)


def test_the_predictor_learns_from_states_and_from_lengths() -> None:
    torch.manual_seed(0)
    means, lengths = torch.randn(256, 8), torch.randint(1, 200, (256,))
    for labels in ((means[:, 2] > means[:, 3]).long(), (lengths > 60).long()):
        predictor = BudgetPredictor(8, 2, 32)
        optimizer = torch.optim.Adam(predictor.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            balanced_loss(predictor(means, lengths), labels).backward()
            optimizer.step()
        assert (predictor(means, lengths).argmax(1) == labels).float().mean() > 0.95


def record(number: int, chosen: str, small: tuple[float, float], full: tuple[float, float]) -> dict[str, Any]:
    def tried(f1: float, confidence: float, rows: int) -> dict[str, Any]:
        return {"em": f1 == 1, "f1": f1, "rows": rows, "confidence": confidence}

    return {
        "context_tokens": 40,
        "fold": number % 2,
        "chosen": chosen,
        "tries": {"r4": tried(*small, 10), "full": tried(*full, 40)},
    }


def test_scores_against_average_ratios() -> None:
    rows = [
        record(number, "r4" if right else "full", (float(right), -0.1 if right else -3.0), (1.0, -0.1))
        for number, right in enumerate([True, True, False, False, True, True, True, False])
    ]
    found = summarize(rows, 1, 0.1, 0.0)
    assert {"r4", "full", "cascade", "oracle"} == found.arms.keys()
    ratio = 8 * 40 / (5 * 10 + 3 * 40)
    for values in (found.metrics, found.arms["cascade"], found.arms["oracle"]):
        assert values["f1"].value == 1
        assert values["ratio"].value == pytest.approx(ratio)
        assert values["kept_full"].value == 3 / 8
    assert found.arms["r4"]["ratio"].value == 4
    assert found.arms["r4"]["f1"].value == 5 / 8
    assert found.arms["cascade"]["rows_read"].value == pytest.approx((5 * 10 + 3 * 50) / 8)
    assert found.differences["f1"]["r4"].value == pytest.approx(3 / 8)


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported compressor, barely trained."""
    folder = tmp_path_factory.mktemp("adaptive")
    config = {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {
            "class_path": f"{SQUAD}.ContextCompressor",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder), "lora": {"r": 2}},
                "source": {"frozen": False},
                "max_new_tokens": 3,
            },
        },
        "data": DATA,
    }
    assert cases.fit(config, folder / "run") == 0
    assert main(["export", str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out"


def config_of(exported: Path, **settings: Any) -> Any:
    init = {"compressor": str(exported), "budgets": RATIOS, "max_new_tokens": 3, "hidden": 8, **settings}
    return {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {"class_path": f"{SQUAD}.adaptive_budget.AdaptiveBudget", "init_args": init},
        "data": DATA,
    }


def test_it_trains_the_predictor_alone(exported: Path, tmp_path: Path) -> None:
    import kvc

    assert cases.fit(config_of(exported), tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"f1", "em", "ratio", "kept_full"} <= result["metrics"].keys()
    assert {"r16", "r4", "full", "cascade", "oracle"} == result["arms"].keys()
    assert result["arms"]["full"]["ratio"]["value"] == 1
    assert all(name.startswith("predictor.") for name in cases.checkpoint(tmp_path / "run")["state_dict"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ours, back = kvc.load(tmp_path / "run"), kvc.load(tmp_path / "out")
    assert cases.same_bits(ours.trained_state(), back.trained_state()) == []


def test_tries_are_what_the_compressor_says(exported: Path) -> None:
    from kvc.data.squad import Squad
    from kvc.methods.squad.answers import texts

    made: Any = build_model(config_of(exported)["model"])
    data = Squad(counts=(4, 4, 4), facts=(2, 9))
    data.trainer = SimpleNamespace(lightning_module=made)
    data.setup("test")
    batch = data.collate("test")([data.dataset("test")[0, row] for row in range(4)])
    tried = made.eval().tries(batch)
    lengths = batch["context_mask"].sum(1)
    assert [one.rows.tolist() for one in tried] == [
        *[(-(-lengths // ratio)).tolist() for ratio in (16, 4)],
        lengths.tolist(),
    ]
    plain = made.compressor.arms
    with made.compressor.backbone.disable_adapter():
        wanted = plain.records(made.compressor.backbone, batch, "full", None, 1.0)
    assert texts(made.tokenizer, tried[2].ids) == [record["completion"] for record in wanted]
    assert all(float(one.confidence.max()) < 0 for one in tried)
    output = made.train().step(batch)
    output.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in made.predictor.parameters())
    assert not made.compressor.training


def test_a_choice_needs_two(exported: Path) -> None:
    with pytest.raises(UserError, match="a choice needs two of them"):
        AdaptiveBudget(str(exported), budgets=[], keep=True)
