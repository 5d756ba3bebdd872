"""Training losses of compressors: terms with weights, to be combined freely."""

from kvc.methods.squad.losses.contrastive import InfoNce, OffdiagMargin
from kvc.methods.squad.losses.evidence import Evidence, Predicted, predicted
from kvc.methods.squad.losses.generation import FirstErrorCe, OnPolicyKd, SelfCritical
from kvc.methods.squad.losses.kd import Kd
from kvc.methods.squad.losses.mix import Mix, Term
from kvc.methods.squad.losses.teacher_forcing import TeacherForcing

__all__ = [
    "Evidence",
    "FirstErrorCe",
    "InfoNce",
    "Kd",
    "Mix",
    "OffdiagMargin",
    "OnPolicyKd",
    "Predicted",
    "SelfCritical",
    "TeacherForcing",
    "Term",
    "predicted",
]
