"""Small quantized weights, one file per storage format, that a person can check by eye."""
