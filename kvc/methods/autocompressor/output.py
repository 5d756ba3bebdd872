"""What a forward of an AutoCompressor returns."""

from dataclasses import dataclass

import torch

from kvc.methods.autocompressor.compressor import Reading
from kvc.methods.autocompressor.softprompt import SoftPrompt


@dataclass(frozen=True)
class AutoCompressorOutput:
    """Outcome of one forward.

    Attributes:
        logits: `[B, L, V]` of the text.
        loss: Mean negative log-likelihood of the labels, plus the length penalty where summaries are soft; None
            without labels.
        reading: Hidden states, soft prompt and reports.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None
    reading: Reading

    @property
    def softprompt(self) -> torch.Tensor:
        """Summary vectors `[B, m, D]`; zeros where a row has fewer than others."""
        return self.reading.prompt.vectors

    @property
    def softprompt_mask(self) -> torch.Tensor:
        """Which of them are there, bool `[B, m]`."""
        return self.reading.prompt.valid

    @property
    def prompt(self) -> SoftPrompt:
        """Summary vectors with their mask, as `softprompt` of the next forward takes them."""
        return self.reading.prompt
