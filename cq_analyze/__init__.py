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
    from cq_analyze.report import Finding, Report
    from cq_analyze.verification import verify

__all__ = ["Finding", "Report", "verify"]
__getattr__ = exports(
    __name__,
    {
        "Finding": "cq_analyze.report",
        "Report": "cq_analyze.report",
        "verify": "cq_analyze.verification",
    },
)
