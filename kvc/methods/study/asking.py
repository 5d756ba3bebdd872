"""Answers to questions, `n` samples of each in one batch, with the memory of one arm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvc.core.files import digest
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError
from kvc.generation.decode import generate
from kvc.generation.output import Output
from kvc.generation.progress import DecodeProgress
from kvc.methods.study.arms import Arm
from kvc.methods.study.conversation import Conversation
from kvc.methods.study.layouts import END_THINK
from kvc.methods.study.questions import Asked
from kvc.methods.study.reading import sampler_of


@dataclass(frozen=True)
class AskSettings:
    """How questions are answered.

    Attributes:
        repeat_time: Samples of each answer, decoded in one batch.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Share of the probability that is drawn from, at a temperature above 0.
        seed: Sample i of a question draws what a single sample draws with the seed plus i.
    """

    repeat_time: int = 1
    max_new_tokens: int = 8192
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: If a value is out of range, or samples would all be the same.
        """
        for name in ("repeat_time", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature must not be negative, and top_p must be above 0 and at most 1")
        if self.repeat_time > 1 and self.temperature == 0:
            raise UserError("repeat_time: greedy answers to one question are all the same, set a temperature")

    def seeds(self, question: str) -> list[int]:
        """Seeds of the samples of a question: they depend on nothing but the seed and the question."""
        return [int(digest([self.seed + i, question])[:8], 16) for i in range(self.repeat_time)]


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    conversation: Conversation,
    arm: Arm,
    questions: Sequence[Asked],
    settings: AskSettings,
    streamer: BaseStreamer | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer questions together.

    Args:
        model: In eval mode.
        conversation: Of the study's kind.
        arm: What the model knows.
        questions: Decoded in one batch, each with all its samples.
        settings: How.
        streamer: Gets the tokens of a single answer as they come.
        progress: Show a bar.

    Returns:
        A result for each question; see the README of this folder.
    """
    asked = [(conversation.alone if arm.memory is None else conversation.question)(q.question) for q in questions]
    input_ids, mask = _padded(asked, conversation, model.device)
    seeds = [seed for question in questions for seed in settings.seeds(question.question)]
    with DecodeProgress(settings.max_new_tokens, len(seeds), enabled=progress) as bar:
        output = generate(
            model,
            input_ids,
            mask,
            max_new_tokens=settings.max_new_tokens,
            memory=None if arm.memory is None else arm.memory.fork(),
            sampler=sampler_of(settings.temperature, settings.top_p, seeds),
            samples=settings.repeat_time,
            tokenizer=conversation.tokenizer,
            streamer=streamer,
            progress=bar,
        )
    known = 0 if arm.memory is None else int(arm.memory.next_position[0])
    results = []
    for number, question in enumerate(questions):
        rows = range(number * settings.repeat_time, (number + 1) * settings.repeat_time)
        results.append(
            {
                "arm": arm.name,
                **question._asdict(),
                "num_repeats": settings.repeat_time,
                "all_generations": [_generation(output, row, known) for row in rows],
                "prefill_seconds": output.prefill_seconds / len(questions),
                "decode_seconds": output.decode_seconds / len(questions),
            }
        )
    return results


def response(text: str) -> str:
    """The answer itself: what follows the thinking, or all of a text that has no end of it."""
    return text.rpartition(END_THINK)[2].strip()


def _generation(output: Output, row: int, known: int) -> dict[str, Any]:
    assert output.texts is not None
    usage = output.usage.summary(row)
    return {
        "generated_text": output.texts[row],
        "response": response(output.texts[row]),
        "input_length": output.prompt_tokens[row],
        "output_length": len(output.tokens[row]),
        "cache_seq_len": known,
        "kv_tokens_peak": usage["kv_tokens_peak"],
        "kv_bytes_peak": usage["kv_bytes_peak"],
        "finish": output.finish[row],
    }


def _padded(
    rows: Sequence[Sequence[int]], conversation: Conversation, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Left-padded `input_ids` and mask `[B, T]`; no mask where nothing is padded."""
    longest = max(map(len, rows))
    pad: Any = conversation.tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return input_ids, None
    return input_ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
