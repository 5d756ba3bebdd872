"""Eviction policies: which rows of a KV memory stay when it has to shrink to a budget."""
