"""Files as `kvc ask` writes them, from counts of right samples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STUDY = {
    "schema": 1,
    "model": {"name": "tiny", "hash": "0123"},
    "documents": "f00d",
    "mode": "takeaways",
    "summary_complexity": "complex",
    "budget": 1312,
    "window": 128,
    "prefix": 160,
    "policy": "rkv",
    "policy_settings": {"window": 128},
    "rotation": "keep",
    "num_epochs": 1,
    "data_limit": None,
    "max_new_tokens": 2048,
    "temperature": 0.1,
    "top_p": 0.95,
    "seed": 42,
}


def sample(response: str, **more: Any) -> dict[str, Any]:
    thought = {"generated_text": f"hm</think>{response}", "response": response, "input_length": 40}
    costs = {"output_length": 12, "cache_seq_len": 900, "kv_tokens_peak": 1350.5, "kv_bytes_peak": 4096}
    return {**thought, **costs, "finish": "eos", **more}


def result(number: int, arm: str, responses: Sequence[str], answer: str | None = "16") -> dict[str, Any]:
    return {
        "arm": arm,
        "id": number,
        "question": f"Question {number}?",
        "answer": answer,
        "num_repeats": len(responses),
        "all_generations": [sample(response) for response in responses],
        "prefill_seconds": 0.1,
        "decode_seconds": 2.0,
    }


def content(results: list[dict[str, Any]], seed: int = 42, documents: int = 3, **study: Any) -> dict[str, Any]:
    memory = {"path": "memories/first", "content": "abc", "rows": 1312.0, "bytes": 1000, "next_position": 900}
    return {
        "schema": 1,
        "kind": "ask",
        "model": {"name": "tiny", "hash": "0123"},
        "memory": {**memory, "study": {**STUDY, **study, "seed": seed}, "documents": documents},
        "settings": {"repeat_time": 4, "max_new_tokens": 8192, "temperature": 0.6, "top_p": 0.95, "seed": seed},
        "arms": list(dict.fromkeys(entry["arm"] for entry in results)),
        "results": results,
        "versions": {"kvc": "0.1.0"},
    }


def write(path: Path, arms: Mapping[str, Sequence[int]], samples: int = 4, **settings: Any) -> Path:
    """A file whose arms have so many right samples of each question."""
    results = [
        result(number, arm, [r"\boxed{016}"] * right + ["It is 7."] * (samples - right))
        for number, rights in enumerate(zip(*arms.values()))
        for arm, right in zip(arms, rights)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content(results, **settings)))
    return path
