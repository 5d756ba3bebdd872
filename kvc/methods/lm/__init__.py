"""Plain language modelling: the tiny base model, full-context controls, reports on a base model."""

from kvc.methods.lm.module import LanguageModel
from kvc.methods.lm.report import TaskReport

__all__ = ["LanguageModel", "TaskReport"]
