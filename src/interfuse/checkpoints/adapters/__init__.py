"""LoRA adapters on disk: which factors belong to which tensor, a model with one added, an adapter written. No merging."""
