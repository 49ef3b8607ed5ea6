"""Looking at checkpoints without changing them.

Is a quantized file what ComfyUI expects, and how near is it to the weights that it was made from?

>>> import cq, cq_analyze
>>> report = cq_analyze.verify(cq.open("flux-int8.safetensors"))     # doctest: +SKIP
>>> report.passed, [str(f) for f in report.findings]                 # doctest: +SKIP
(True, [])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cq.core.lazy import exports

if TYPE_CHECKING:
    from cq_analyze.budget import Mixture, choose_formats
    from cq_analyze.deep import Measurements, measure
    from cq_analyze.description import Analysis, analyze
    from cq_analyze.images import compare_images
    from cq_analyze.page import page as html_report
    from cq_analyze.recipes import template
    from cq_analyze.report import Finding, Report
    from cq_analyze.verification import verify
    from cq_analyze.verify_page import verify_page

__all__ = [
    "Analysis",
    "Finding",
    "Measurements",
    "Mixture",
    "Report",
    "analyze",
    "choose_formats",
    "compare_images",
    "html_report",
    "measure",
    "template",
    "verify",
    "verify_page",
]
__getattr__ = exports(
    __name__,
    {
        "Analysis": "cq_analyze.description",
        "analyze": "cq_analyze.description",
        "choose_formats": "cq_analyze.budget",
        "compare_images": "cq_analyze.images",
        "Finding": "cq_analyze.report",
        "html_report": "cq_analyze.page:page",
        "measure": "cq_analyze.deep",
        "Measurements": "cq_analyze.deep",
        "Mixture": "cq_analyze.budget",
        "Report": "cq_analyze.report",
        "template": "cq_analyze.recipes",
        "verify": "cq_analyze.verification",
        "verify_page": "cq_analyze.verify_page",
    },
)
