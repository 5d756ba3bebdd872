"""Annotators that put `<COMP>` into reasoning, and statistics of where it stands."""
