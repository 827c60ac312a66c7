"""What every method promises, as plain functions, for methods of your own: fusions of features, and ways to merge weights.

    from interfuse.testing import check_fusion, check_weight_method
    check_fusion("my_fusion")
    check_weight_method("my_merge", WeightClaims(options={"density": 0.5}))

A check raises an `AssertionError` that says what doesn't hold. Whether a method computes its formula isn't checked here:
that needs a reference of its own.
"""

from interfuse.testing import weights as weights
from interfuse.testing.fusions import BATCH as BATCH
from interfuse.testing.fusions import DIM as DIM
from interfuse.testing.fusions import FUSION_CHECKS as FUSION_CHECKS
from interfuse.testing.fusions import WIDTHS as WIDTHS
from interfuse.testing.fusions import Check as Check
from interfuse.testing.fusions import Claims as Claims
from interfuse.testing.fusions import check_compile as check_compile
from interfuse.testing.fusions import check_export as check_export
from interfuse.testing.fusions import check_fusion as check_fusion
from interfuse.testing.fusions import check_gradients as check_gradients
from interfuse.testing.fusions import check_half_precision as check_half_precision
from interfuse.testing.fusions import check_missing_model as check_missing_model
from interfuse.testing.fusions import check_missing_rows as check_missing_rows
from interfuse.testing.fusions import check_missing_tokens as check_missing_tokens
from interfuse.testing.fusions import check_modes as check_modes
from interfuse.testing.fusions import check_permutation as check_permutation
from interfuse.testing.fusions import check_refusals as check_refusals
from interfuse.testing.fusions import check_shapes as check_shapes
from interfuse.testing.fusions import check_state as check_state
from interfuse.testing.fusions import check_unequal_tokens as check_unequal_tokens
from interfuse.testing.fusions import check_weights as check_weights
from interfuse.testing.fusions import make_fusion as make_fusion
from interfuse.testing.fusions import some_features as some_features
from interfuse.testing.weights import WEIGHT_CHECKS as WEIGHT_CHECKS
from interfuse.testing.weights import WeightCheck as WeightCheck
from interfuse.testing.weights import WeightClaims as WeightClaims
from interfuse.testing.weights import check_weight_method as check_weight_method
