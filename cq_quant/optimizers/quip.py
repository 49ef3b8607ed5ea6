"""`quip`: LDLQ rounding in the rotated basis, stored in that basis.

LDLQ feeds the error of rounded columns into the columns to come, weighted by the second moment H of
the layer's inputs. Without calibration data H is the identity, the feedback is zero, and LDLQ *is*
nearest rounding: the gain is then the rotation's alone. A random stand-in for calibration would
make the result worse than nearest rounding. The rotated codes are what is stored and run; rounding
them again in the original basis would add a second, unshaped error.

Source: QuIP, arXiv 2307.13304 (LDLQ, incoherence); ConvRot, arXiv 2512.03673 (the rotation).
"""

from __future__ import annotations

from cq_quant.optimizers._feedback import Feedback


class Quip(Feedback):
    """The optimizer plug."""

    name = "quip"
    rotates = True
    note = "without calibration data quip rounds to the nearest level, in the rotated basis"


PLUG = Quip()
