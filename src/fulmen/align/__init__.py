"""Alignment: a trained model learns which answers people prefer (docs/align.md)."""

from fulmen.align.dpo import PreferenceLoss, dpo_loss
from fulmen.align.preference import PreferenceObjective
from fulmen.align.recipe import PreferenceRecipe

__all__ = ["PreferenceLoss", "PreferenceObjective", "PreferenceRecipe", "dpo_loss"]
