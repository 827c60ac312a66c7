"""Eight fine-tunes of MiniLM on eight sets of texts, and what sharing their first layers saves and costs.

`python -m benchmarks.text_experts` from the repository's root; `__main__.py` says what is measured, and how.
"""
