"""Base of what is measured without training: full-KV and no-context arms, eviction policies, reports."""

from kvc.core.module import KvcModule


class Evaluation(KvcModule):
    """Runs under `test`, `validate` and `predict` with no checkpoint; `fit` refuses it."""
