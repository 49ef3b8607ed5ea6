"""Looking at checkpoints without changing them.

Is a quantized file what ComfyUI expects, and how near is it to the weights that it was made from?

>>> import cq, cq_analyze
>>> report = cq_analyze.verify(cq.open("flux-int8.safetensors"))     # doctest: +SKIP
>>> report.passed, [str(f) for f in report.findings]                 # doctest: +SKIP
(True, [])
"""

from __future__ import annotations

from cq_analyze.report import Finding, Report
from cq_analyze.verify import verify

__all__ = ["Finding", "Report", "verify"]
