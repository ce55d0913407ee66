"""A run's report: one HTML file with its numbers, its figures and how each was measured, readable anywhere.

document.py composes it, evaluation.py tells what was measured, from the steps' files that inputs.py reads and
checks; figures.py draws, in the style and as the inline SVG of drawing.py, and page.py makes the HTML.
"""

from pipelines.report.document import write_report
from pipelines.report.inputs import ReportError

__all__ = ["ReportError", "write_report"]
