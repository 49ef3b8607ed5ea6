"""`bf16`: a plain cast to bfloat16."""

from cq.core.formats.fp32 import Cast

PLUG = Cast("bf16", "BF16")
