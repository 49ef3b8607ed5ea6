"""`fp16`: a plain cast to float16."""

from cq.core.formats.fp32 import Cast

PLUG = Cast("fp16", "F16")
