"""`float8_e5m2`: 8-bit floats, 5 exponent and 2 mantissa bits, with one float32 scale.

Stored as `float8_e4m3fn` is. Half its precision: for files that must keep the dtype of their
source.
"""

from cq.core.formats.float8_e4m3fn import Float8

PLUG = Float8("float8_e5m2", "F8_E5M2", largest=57344.0)
