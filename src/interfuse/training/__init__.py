"""Training what was fused: `fit`, on Lightning."""
