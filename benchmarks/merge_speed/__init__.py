"""How fast checkpoints are merged: against the floor that memory sets (`floor.c`), and against mergekit 0.1.5.

`python -m benchmarks.merge_speed` from the repository's root; `__main__.py` says what is measured, and how.
"""
