"""Medusa on Ray, the core: heads, token trees, and an engine that decodes several tokens a step without loss."""

from medusa.decoding import Typical
from medusa.engine.engine import Engine
from medusa.engine.followers import TensorParallelError
from medusa.engine.sequence import Completion, Output, TokenLogprob
from medusa.engine.stats import EngineStats
from medusa.engine.step_times import StepTimes
from medusa.grammar import Grammar
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.sampling import SamplingParams
from medusa.tree import TokenTree

__all__ = [
    "Completion",
    "Engine",
    "EngineStats",
    "Grammar",
    "HeadsConfig",
    "MedusaHeads",
    "Output",
    "SamplingParams",
    "StepTimes",
    "TensorParallelError",
    "TokenLogprob",
    "TokenTree",
    "Typical",
]
__version__ = "0.1.0"
