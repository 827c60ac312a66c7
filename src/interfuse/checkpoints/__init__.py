"""Checkpoints: named tensors on disk or in memory, read late and written whole. No arithmetic happens here."""
