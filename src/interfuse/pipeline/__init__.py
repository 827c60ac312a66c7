"""From a recipe to a finished folder, and back: the one place where all parts meet. No arithmetic of its own.

Importing it loads no torch, so that a merge of files starts fast: `networks` is imported where networks are needed.
"""

from interfuse.pipeline.comparing import compare_runs as compare_runs
from interfuse.pipeline.finished import load_run as load_run
from interfuse.pipeline.record import RunRecord as RunRecord
from interfuse.pipeline.steps import check as check
from interfuse.pipeline.steps import run as run
from interfuse.pipeline.verifying import Verification as Verification
from interfuse.pipeline.verifying import verify as verify
