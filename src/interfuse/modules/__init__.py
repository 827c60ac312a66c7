"""Networks made of networks: taps that read features, one small module a way of fusing them, and what puts them together.

Importing this package registers the built-in methods of the levels features and outputs, in the order of this list.
"""

from interfuse.modules import attention, gate, shared, concat, average, transformer, ensemble  # noqa: F401, I001
