"""A merge's recipe and its models' headers in; every output tensor out, with where it comes from and which parameters hold.

Pure, and it knows no method: it says which tensors of which models meet, at which depth, under which parameters, and lists
everything that doesn't fit. What is computed of them is `plan`'s part, and so are shapes and types. Linear in the tensors.
"""

from interfuse.layout.resolve import layout as layout
from interfuse.layout.slots import Group as Group
from interfuse.layout.slots import Header as Header
from interfuse.layout.slots import Layout as Layout
from interfuse.layout.slots import Slot as Slot
