"""`gptq`: LDLQ rounding in the original basis.

Each column is rounded to make up for what the columns before it lost, by the second moment of the
layer's inputs; those that weigh most come first. Without calibration it is nearest rounding.

Source: GPTQ, arXiv 2210.17323; that it is LDLQ, QuIP, arXiv 2307.13304.
"""

from __future__ import annotations

from cq_quant.optimizers._feedback import Feedback


class Gptq(Feedback):
    """The optimizer plug."""

    name = "gptq"
    note = "without calibration data gptq rounds to the nearest level"


PLUG = Gptq()
