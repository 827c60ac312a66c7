"""Networks made of networks: taps that read features, one small module a way of fusing them, and what puts them together.

Importing this package registers the built-in methods of the level features, in the order of this list.
"""

from interfuse.modules import attention as attention  # isort: skip
from interfuse.modules import gate as gate  # isort: skip
from interfuse.modules import shared as shared  # isort: skip
from interfuse.modules import concat as concat  # isort: skip
from interfuse.modules import average as average  # isort: skip
from interfuse.modules import transformer as transformer  # isort: skip
