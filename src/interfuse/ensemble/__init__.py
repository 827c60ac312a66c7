"""The level outputs: the predictions of several networks as one, what is learned for that, and calibration.

Importing this package registers `ensemble`.
"""

from interfuse.ensemble.network import Ensemble as Ensemble
