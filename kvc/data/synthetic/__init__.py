"""Generators of exactly verifiable text: every document is a pure function of a random generator."""
