"""Methods that fuse weights; importing this package registers them.

A method is a plain function. Those here give coefficients: `(weights, *, options) -> Combination`, with one weight a
model. They see no tensor; the plan records their numbers and the engine does the sum.
"""

from interfuse.methods import average as average
from interfuse.methods import balance as balance
from interfuse.methods import geodesic as geodesic
from interfuse.methods import knots as knots
from interfuse.methods import regression as regression
from interfuse.methods import selection as selection
from interfuse.methods import sparse as sparse
from interfuse.methods import spectral as spectral
from interfuse.methods import task_vectors as task_vectors
