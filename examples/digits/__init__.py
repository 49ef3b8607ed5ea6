"""A tiny Flux.1-architecture model of handwritten digits, and a LoRA for it."""
