"""Samples of one question, many times: extraction, equality, pass@k, majority, and what they say about an arm."""
