"""A depthwise convolution over time, averaged into slots, with the gate of WaveNet (van den Oord et al. 2016).

Shapes: B batch, S source tokens, M slots, D width, F frames, k kernel.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from kvc.methods.squad.bins import even_bins
from kvc.methods.squad.interface import Plan, SlotCompressor
from kvc.methods.squad.scale import output_norm


class Convolution(SlotCompressor):
    """Depthwise convolution with kernel k = 2 s, s = max(1, max_length // slots), bin means, gate, norm.

    States are brought to unit scale first: embeddings are so small that the gate would see little but its biases. A
    frame at an edge is divided by the share of its kernel that lies on the text (partial convolution), so padding
    changes nothing. It starts near mean pooling: the kernel takes most of its own token, the gate hands through.
    Parameters: (D k + D) + (2 D^2 + 2 D) + 2 D. Nothing is made for single slots: any budget will do.

    Args:
        width: D.
        rms: Root mean square of the output at the start, that of the embeddings.
        slots: Number of slots that the kernel is made for.
        max_length: Length of text that the kernel is made for, in tokens.
        stride_mode: `dense`: a frame for each token; `strided`: one for each s tokens, which a short text repeats.
    """

    def __init__(
        self,
        width: int,
        rms: float,
        slots: int = 64,
        max_length: int = 512,
        stride_mode: Literal["dense", "strided"] = "dense",
    ) -> None:
        super().__init__(width, slots)
        self.most = None
        self.step, self.stride_mode = max(1, max_length // slots), stride_mode
        self.conv = nn.Conv1d(width, width, 2 * self.step, groups=width)
        self.gate = nn.Linear(width, 2 * width)
        self.norm_out = output_norm(width, rms)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)
            self.conv.weight[:, 0, self.step - 1 if stride_mode == "dense" else self.step] += 1.0
            # Half of the signal, where tanh is nearly straight; the sigmoid of next to nothing is the same for all.
            self.gate.weight.mul_(0.1)
            self.gate.weight[:width] += 0.5 * torch.eye(width)

    def compress(
        self, states: torch.Tensor, mask: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Frames, then bins."""
        states = F.layer_norm(states, (self.width,), eps=1e-12)
        frames, lengths = self._frames(states, mask, plan.lengths)
        pooled = even_bins(lengths, plan).mean(frames)
        signal, gate = self.gate(pooled).chunk(2, dim=-1)
        return self.norm_out(signal.tanh() * gate.sigmoid()), {}

    def _frames(
        self, states: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `[B, F, D]` and how many of them each row has, `[B]`."""
        dense = self.stride_mode == "dense"
        stride, pads = (1, (self.step - 1, self.step)) if dense else (self.step, (self.step, self.step))
        x, valid = F.pad(states.transpose(1, 2), pads), F.pad(mask[:, None].to(states.dtype), pads)
        summed = F.conv1d(x, self.conv.weight, None, stride, groups=self.width)
        ones = valid.new_ones(1, 1, 2 * self.step)
        share = F.conv1d(valid, ones, None, stride) / ones.numel()
        # At least one token of the kernel is valid in every frame that counts.
        frames = summed / share.clamp(min=0.5 / ones.numel())
        frames = frames + self.conv.bias[:, None]  # type: ignore[index]
        return frames.transpose(1, 2), lengths if dense else (lengths // self.step + 1) * (lengths > 0)
