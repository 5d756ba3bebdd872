"""COMP classifier: where in a chain of thought to compress."""

from kvc.methods.comp.module import CompClassifier

__all__ = ["CompClassifier"]
