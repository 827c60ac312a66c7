"""Methods that fuse weights; importing this package registers them.

A method is a plain function. Those here give coefficients: `(weights, *, options) -> Combination`, with one weight a
model. They see no tensor; the plan records their numbers and the engine does the sum.
"""

from interfuse.methods import average as average
from interfuse.methods import task_vectors as task_vectors
