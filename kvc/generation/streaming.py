"""A bridge to the streamers of transformers, which print or queue text while it is made."""

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvc.errors import UserError


class StreamTo:
    """Passes the tokens of a batch of one row to a streamer, as `model.generate` would.

    Call `put` once with the prompt, then with every new token, and `end` also when decoding fails: whoever reads from
    a `TextIteratorStreamer` in another thread waits for it.

    Args:
        streamer: Any streamer of transformers, e.g. `TextStreamer` or `TextIteratorStreamer`.
    """

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer

    def put(self, tokens: Tensor) -> None:
        """Pass on the prompt or the newest token.

        Args:
            tokens: int64 `[1, T]` or `[1]`, on any device.

        Raises:
            UserError: If there is more than one row.
        """
        if tokens.shape[0] != 1:
            raise UserError(f"streamer: only a batch of one row can be streamed, got {tokens.shape[0]} rows")
        self.streamer.put(tokens.cpu())

    def end(self) -> None:
        """Say that no token follows."""
        self.streamer.end()
