"""Side-by-side measurements of gankern and stock PyTorch."""

from gankern.bench.cases import CASES, Case, Sides
from gankern.bench.measure import run_case
from gankern.bench.results import CaseResult, Report, TrainingResult

__all__ = ["CASES", "Case", "CaseResult", "Report", "Sides", "TrainingResult", "run_case"]
