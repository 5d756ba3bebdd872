"""Decoding new text: the loop, and what plugs into it."""
