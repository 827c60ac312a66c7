"""Methods that fuse weights; importing this package registers them.

A method is a plain function in one of four forms, which `interfuse.methods.forms` describes. By the numbers alone it gives
coefficients, or a rule of how to trim, elect and scale; or it merges the deltas, in blocks or matrix by matrix. None reads
or writes a tensor's file: that, and the arithmetic of the first two, is the engine's.
"""

from interfuse.methods import average as average
from interfuse.methods import balance as balance
from interfuse.methods import geodesic as geodesic
from interfuse.methods import knots as knots
from interfuse.methods import learned as learned
from interfuse.methods import regression as regression
from interfuse.methods import selection as selection
from interfuse.methods import sparse as sparse
from interfuse.methods import spectral as spectral
from interfuse.methods import task_vectors as task_vectors
