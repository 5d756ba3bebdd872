"""One line per layer and compression, for those who ask: `RKV_DEBUG_COMPRESSION=1`."""

import os
import sys

VARIABLE = "RKV_DEBUG_COMPRESSION"


def enabled() -> bool:
    """Whether the environment asks for the lines: 1, true, yes or on."""
    return os.environ.get(VARIABLE, "").strip().lower() in {"1", "true", "yes", "on"}


def report(layer: int, before: int, after: int, next_position: int, rotation_target: int | None = None) -> None:
    """Print what one compression did to one layer to stderr, if the environment asks for it.

    Args:
        layer: Number of the layer.
        before: Rows in its memory before.
        after: Rows after.
        next_position: Position of the next token.
        rotation_target: Where rotated keys were placed; None if keys keep their rotation.
    """
    if enabled():
        offset = "n/a" if rotation_target is None else rotation_target
        print(
            f"[R1KV][layer {layer}] compressed cache {before} -> {after} "
            f"(rotated={rotation_target is not None}, rotation_offset={offset}, next_pos={next_position})",
            file=sys.stderr,
        )
