"""What a merge writes to a folder besides tensors: the folder itself, its journal, its card, the proof that it loads."""
