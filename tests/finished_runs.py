"""Small finished runs for tests of comparisons: result, predictions, events and a picture, without any training."""

import json
from pathlib import Path
from typing import Any

import yaml

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc000000301010018dd8db00000000049454e44ae426082"
)


def number(value: float, half: float = 0.02, n: int = 50) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def make_run(folder: Path, budget: int = 64, seed: int = 42, quality: float = 0.8, **changes: Any) -> Path:
    """A run folder as `fit` leaves it: an eviction policy with a budget of tokens.

    Args:
        folder: Made with all its parents.
        budget: Tokens kept; decides the bytes.
        seed: Seed of the run.
        quality: Its exact match.
        changes: Further keys of `result.json`; None removes one.
    """
    config = {
        "seed_everything": seed,
        "name": folder.name,
        "model": {"class_path": "kvc.methods.demo.Demo", "init_args": {"budget": budget, "seed": seed}},
    }
    result = {
        "schema": 1,
        "command": "fit",
        "method": "kvc.methods.demo.Demo",
        "seed": seed,
        "split": "test",
        "samples": 50,
        "headline": ["exact_match", "kv_bytes_peak"],
        "metrics": {
            "exact_match": number(quality),
            "kv_bytes_peak": number(budget * 2048.0, 900.0),
            "perplexity": number(3.0 - quality),
        },
        "arms": {
            "full_kv": {"exact_match": number(0.95), "kv_bytes_peak": number(1_048_576.0, 0.0)},
            "no_context": {"exact_match": number(0.1)},
        },
        "differences": {"exact_match": {"full_kv": number(quality - 0.95), "no_context": number(quality - 0.1)}},
        "base_model": {"name": "tiny", "hash": "b" * 8},
        "data": {"hash": "d" * 8},
        "sizes": {"trainable_parameters": 16_641},
        "timing": {"fit_seconds": 10.0 + seed / 10, "evaluation_seconds": 2.0},
        "pictures": ["attention.png"],
        "config": config,
        "versions": {"python": "3.11", "kvc": "0.1.0", "torch": "2.13.0"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "machine": {"processor": "x86_64", "cpus": 2, "gpus": []},
        **changes,
    }
    result = {key: value for key, value in result.items() if value is not None}
    evaluation = folder / "eval" / "test"
    evaluation.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for place in (folder, evaluation):
        (place / "result.json").write_text(json.dumps(result))
    records = [
        {
            "id": i,
            "task": "passages",
            "prompt": f"Where is item {i}? <script>alert({i})</script>",
            "gold": f"room {i}",
            "completion": f"room {i}" if i % 2 else "I do not know. " * 60,
            "correct": bool(i % 2),
        }
        for i in range(3, 12)
    ]
    write_records(folder, records)
    (evaluation / "attention.png").write_bytes(PIXEL)
    write_events(folder, {"val/loss": [(10 * i, 2.0 / i + budget / 1000) for i in range(1, 6)]})
    return folder


def write_records(run: Path, records: list[dict[str, Any]]) -> None:
    lines = (json.dumps(record) for record in records)
    (run / "eval" / "test" / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))


def write_events(run: Path, tags: dict[str, list[tuple[int, float]]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run))
    for tag, curve in tags.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step)
    writer.close()


def twelve(folder: Path) -> list[Path]:
    """Six budgets with two seeds each."""
    budgets = (8, 32, 128, 256, 384, 448)
    return [
        make_run(folder / f"b{budget}-s{seed}", budget, seed, quality=0.2 + 0.12 * i + seed / 1000)
        for i, budget in enumerate(budgets)
        for seed in (42, 43)
    ]
