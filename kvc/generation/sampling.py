"""Which token comes next: the most likely one, a drawn one, or a given one.

Shapes: B live rows, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvc.core import seeds
from kvc.errors import UserError

BLOCK = 256
"""Uniform numbers that a row draws at once."""


class Sampler(ABC):
    """Picks the next token of every live row."""

    def reset(self, rows: int) -> None:  # noqa: B027 - a sampler without state has nothing to forget
        """Forget all rows and start with `rows` new ones."""

    @abstractmethod
    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Pick one token for each live row.

        Args:
            logits: `[B, V]`, any floating dtype and device.
            rows: Number of each of the B rows in the batch that `reset` announced.

        Returns:
            int64 `[B]` on the device of `logits`.
        """


class Greedy(Sampler):
    """Picks the most likely token."""

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Sampler`."""
        return logits.argmax(dim=-1)


class Sampling(Sampler):
    """Draws the next token; filters are applied in the order of `model.generate`.

    What a row draws depends on the seed, its number and its step, and never on which other rows are live. The uniform
    numbers come from the CPU, so the same seed gives the same tokens on every device where the logits are the same,
    up to rounding at the border between two tokens.

    Args:
        temperature: Divides the logits.
        top_p: Keeps the fewest most likely tokens whose probabilities add up to this; 1 keeps all.
        top_k: Keeps this many most likely tokens; 0 keeps all.
        min_p: Keeps tokens at least this share as likely as the most likely one; 0 keeps all.
        seed: Seed of all rows; or one for each row, which then draws what a batch of that row alone draws.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.6,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = seeds.DEFAULT_SEED,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature: it must be above 0, got {temperature}; use Greedy for the most likely token")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p: it must be above 0 and at most 1, got {top_p}")
        if top_k < 0:
            raise UserError(f"top_k: it cannot be negative, got {top_k}; 0 keeps all tokens")
        if not 0 <= min_p <= 1:
            raise UserError(f"min_p: it must be between 0 and 1, got {min_p}")
        self.temperature, self.top_p, self.top_k, self.min_p, self.seed = temperature, top_p, top_k, min_p, seed
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            self._warpers.append(MinPLogitsWarper(min_p))
        self.reset(0)

    def reset(self, rows: int) -> None:
        """See `Sampler`; the same seed draws the same numbers again.

        Raises:
            UserError: If there are seeds of another number of rows.
        """
        if rows and not isinstance(self.seed, int) and len(self.seed) != rows:
            raise UserError(f"seed: one for each row is needed, got {len(self.seed)} for {rows} rows")
        self._steps = torch.zeros(rows, dtype=torch.int64)
        self._uniforms = torch.empty(rows, BLOCK, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Sampler`.

        Raises:
            UserError: If the logits of a row are not numbers.
        """
        # A cumulative sum on a GPU is refused in deterministic mode.
        on_cpu = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
        scores = logits.to("cpu" if on_cpu else logits.device, torch.float32)
        for warper in self._warpers:
            scores = warper(None, scores)
        cdf = scores.to(torch.float64).softmax(dim=-1).cumsum(dim=-1)
        total = cdf[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise UserError("logits: they are not finite numbers; the model's dtype may be too narrow")
        # Below the total, so that the token found always has a probability above zero.
        point = (self._draw(rows).to(cdf.device)[:, None] * total).minimum(torch.nextafter(total, total.new_zeros(())))
        return torch.searchsorted(cdf, point, right=True).squeeze(1).to(logits.device)

    def _draw(self, rows: Sequence[int]) -> Tensor:
        """The next uniform number of each row, float64 `[B]` on the CPU."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        steps = self._steps[index]
        for row in index[steps % BLOCK == 0].tolist():
            key = (self.seed, row) if isinstance(self.seed, int) else (self.seed[row], 0)
            source = seeds.generator(*key, int(self._steps[row]) // BLOCK)
            torch.rand(BLOCK, generator=source, out=self._uniforms[row])
        self._steps[index] += 1
        return self._uniforms[index, steps % BLOCK]


class Forced(Sampler):
    """Feeds given tokens whatever the logits say, and keeps how likely each was.

    Args:
        sequences: Tokens of each row, at least one each.
        fill: Token for rows that have run out of theirs, e.g. the one that ends a text.

    Raises:
        UserError: If a row has no tokens.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], fill: int | None = None) -> None:
        for number, sequence in enumerate(sequences):
            if not len(sequence):
                raise UserError(f"sequences: row {number} has no tokens")
        self.fill = fill
        self._lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        self._tokens = torch.full((len(sequences), max(map(len, sequences), default=0) + 1), fill or 0)
        for row, sequence in zip(self._tokens, sequences, strict=True):
            row[: len(sequence)] = torch.as_tensor(sequence)
        self.reset(len(sequences))

    def reset(self, rows: int) -> None:
        """See `Sampler`; feeds every row from its start again.

        Raises:
            UserError: If there are not as many rows as sequences.
        """
        if rows != len(self._lengths):
            raise UserError(f"sequences: one for each row is needed, got {len(self._lengths)} for {rows} rows")
        self._steps = torch.zeros(rows, dtype=torch.int64)
        self._fed: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Sampler`.

        Raises:
            UserError: If a row has run out of tokens and there is no `fill`.
        """
        index = torch.as_tensor(rows, dtype=torch.int64)
        steps = self._steps[index]
        left = steps < self._lengths[index]
        if self.fill is None and not bool(left.all()):
            raise UserError(f"sequences: row {int(index[~left][0])} is longer than its sequence, and there is no fill")
        # Shorter rows are padded with `fill`; the last column is padding in every row.
        tokens = self._tokens[index, steps.clamp(max=self._tokens.shape[1] - 1)]
        self._steps[index] += 1
        tokens = tokens.to(logits.device)
        likely = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        self._fed.append((index[left], likely[left.to(logits.device)]))
        return tokens

    @property
    def log_likelihoods(self) -> list[Tensor]:
        """For each row the log-likelihoods (nats) of the tokens fed so far without `fill`: float32 on the CPU."""
        rows = torch.cat([index for index, _ in self._fed]) if self._fed else torch.empty(0, dtype=torch.int64)
        likely = torch.cat([values for _, values in self._fed]).cpu() if self._fed else torch.empty(0)
        return [likely[rows == row] for row in range(len(self._lengths))]
