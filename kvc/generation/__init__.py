"""Decoding with a memory that changes on the way."""
