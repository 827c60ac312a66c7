"""LoRA adapters merged with each other, and extracted from fine-tunes. What they are on disk is `checkpoints.adapters`."""
