"""Data sets: `Data` holds one in memory (`dataset`), `load_data` reads one (`sources`) from any place a recipe may name."""

from interfuse.data.dataset import Data as Data
from interfuse.data.sources import load_data as load_data
