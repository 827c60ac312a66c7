"""Dense language models put together into a mixture of experts: the base's attention, each expert's feed-forward blocks, and
a router. No weight is trained or merged here; tensors go from file to file through the merge engine.

`recipe` is what the user wrote, `layouts` the forms that outputs may have, `planning` which tensor comes from where,
`gates` the routers' weights, `making` the one that does it.
"""

from interfuse.mixture.making import Mixture as Mixture
from interfuse.mixture.making import moe as moe
