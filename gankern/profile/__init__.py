"""Where a critic step's time goes: `critic_steps` for any loop, ``gankern profile`` from the command line."""

from gankern.profile.penalty import try_penalty
from gankern.profile.recorder import CriticSteps, critic_steps
from gankern.profile.results import Advice, Phase, ProfileReport, StepProfile

__all__ = ["Advice", "CriticSteps", "Phase", "ProfileReport", "StepProfile", "critic_steps", "try_penalty"]
