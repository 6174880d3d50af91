"""A model in memory: trained networks that turn images into labels, without files, in bounded memory."""

from __future__ import annotations

from autoseg.inference.memory import Limits, MemoryPlan
from autoseg.inference.model import Model
from autoseg.inference.records import ImagePrediction, Member, Prediction, Wishes

__all__ = ["ImagePrediction", "Limits", "Member", "MemoryPlan", "Model", "Prediction", "Wishes"]
