"""What every fusion module promises: for a registered method of the level features, yours too.

Each check makes the module, runs it on small random features, and raises an `AssertionError` that says what doesn't hold.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from interfuse.errors import ModelError
from interfuse.modules.fused import ModelFusion
from interfuse.registry import find

BATCH, TOKENS, DIM = 5, 3, 8
#: The widths of the models that the modules are tried with. Their number differs from any default depth.
WIDTHS = (6, 10, 4)


@dataclass(frozen=True)
class Claims:
    """What a method's documentation says of it, where methods differ.

    shares: the weights of the models that are there sum to 1. unequal_tokens: the models may have different numbers of
    tokens. idle: parameters (by the end of their names) that don't matter while all models are there. options: with which
    the method is made.
    """

    shares: bool = True
    unequal_tokens: bool = False
    idle: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


Check = Callable[[str, Claims], None]


def check_fusion(name: str, claims: Claims | None = None) -> None:
    """Run every check of `FUSION_CHECKS` on the method registered as `name` at the level features."""
    for check in FUSION_CHECKS:
        check(name, claims or Claims())


def make_fusion(name: str, claims: Claims, **options: Any) -> nn.Module:
    """The module for `WIDTHS` and `DIM`, in evaluation mode, no parameter at a special value such as zero."""
    torch.manual_seed(0)
    method = find(name, "features")
    module: nn.Module = method.make(WIDTHS, DIM, **method.check({**claims.options, **options}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def some_features(tokens: int | Sequence[int] | None = None, *, seed: int = 1) -> list[Tensor]:
    """A tensor a model: (batch, width), or (batch, tokens, width) with one number of tokens for all, or one a model."""
    counts = tokens if isinstance(tokens, Sequence) else [tokens] * len(WIDTHS)
    random = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, w) if t is None else (BATCH, t, w) for w, t in zip(WIDTHS, counts, strict=True)]
    return [torch.randn(shape, generator=random) for shape in shapes]


def check_shapes(name: str, claims: Claims) -> None:
    """(batch, dim) and (batch, models) from vectors; from tokens (batch, dim) or (batch, tokens, dim)."""
    module = make_fusion(name, claims)
    for tokens in (None, TOKENS, 1):
        fused, weights = module(some_features(tokens))
        allowed = [(BATCH, DIM)] if tokens is None else [(BATCH, DIM), (BATCH, tokens, DIM)]
        assert tuple(fused.shape) in allowed, f"fused is {tuple(fused.shape)}, not one of {allowed}"
        assert weights.shape == (BATCH, len(WIDTHS)), f"weights are {tuple(weights.shape)}"
        assert fused.dtype == weights.dtype == torch.float32
    vector_and_tokens = [some_features()[0], *some_features(TOKENS)[1:]]
    assert module(vector_and_tokens)[0].isfinite().all(), "a vector beside tokens"
    one = find(name, "features").make(WIDTHS[:1], DIM, **claims.options).eval()
    assert one(some_features()[:1])[1].shape == (BATCH, 1), "a single model"


def check_unequal_tokens(name: str, claims: Claims) -> None:
    """Different numbers of tokens are fused where the method takes them, and a `ModelError` where it doesn't."""
    module, features = make_fusion(name, claims), some_features([2, 4, 1])
    if claims.unequal_tokens:
        fused, weights = module(features)
        assert fused.shape == (BATCH, DIM)
        assert weights.shape == (BATCH, len(WIDTHS))
        return
    with _refused("token counts differ"):
        module(features)


def check_weights(name: str, claims: Claims) -> None:
    """Weights are finite and not negative, and sum to 1 where that is claimed."""
    module = make_fusion(name, claims)
    for features in _all_kinds(claims):
        weights = module(features)[1]
        assert weights.isfinite().all()
        assert (weights >= 0).all(), f"negative weights {weights.min()}"
        if claims.shares:
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(BATCH))


def check_gradients(name: str, claims: Claims) -> None:
    """Every parameter and every feature has a part in the fused features."""
    module = make_fusion(name, claims)
    features = [f.requires_grad_() for f in some_features()]
    fused, _ = module(features)
    (fused * torch.randn(fused.shape)).sum().backward()
    for label, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{label} has no gradient"
        assert parameter.grad.isfinite().all(), f"{label} has a gradient that isn't finite"
        assert parameter.grad.abs().max() > 0 or label.endswith(claims.idle or ("\0",)), f"{label} has a gradient of zero"
    assert all(f.grad is not None and f.grad.abs().max() > 0 for f in features), "features without a gradient"


def check_permutation(name: str, claims: Claims) -> None:
    """Permuting the models, with what belongs to each, permutes the weights and leaves the fused features as they are.

    What belongs to each model is in the module's own lists (`ModuleList`, `ParameterList`) of one entry a model.
    """
    module, order = make_fusion(name, claims), [2, 0, 1]
    permuted = copy.deepcopy(module)
    for label, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ParameterList) and len(child) == len(order):
            setattr(permuted, label, type(child)(child[i] for i in order))
    for features in _all_kinds(claims):
        fused, weights = module(features)
        again, moved = permuted([features[i] for i in order])
        torch.testing.assert_close(again, fused, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved, weights[:, order], rtol=1e-5, atol=1e-5)


def check_missing_model(name: str, claims: Claims) -> None:
    """A model that is missing has weight 0, however it is said, and what stands in its features doesn't matter."""
    module = make_fusion(name, claims)
    for features in _all_kinds(claims):
        for k in range(len(WIDTHS)):
            fused, weights = module([None if i == k else f for i, f in enumerate(features)])
            assert (weights[:, k] == 0).all(), f"model {k} is missing and has weight {weights[:, k].max()}"
            away = [torch.zeros(BATCH, dtype=torch.bool) if i == k else None for i in range(len(WIDTHS))]
            for content in (features[k], torch.full_like(features[k], torch.nan)):
                masked, share = module([content if i == k else f for i, f in enumerate(features)], away)
                _same_as_far(masked, fused)
                torch.testing.assert_close(share, weights)


def check_missing_rows(name: str, claims: Claims) -> None:
    """With models missing in some rows, each row is what it is without those models."""
    module = make_fusion(name, claims)
    random = torch.Generator().manual_seed(2)
    there = torch.rand(BATCH, len(WIDTHS), generator=random) > 0.5
    there[torch.arange(BATCH), torch.arange(BATCH) % len(WIDTHS)] = True
    assert not there.all()
    for features in _all_kinds(claims):
        fused, weights = module(features, list(there.unbind(dim=1)))
        for row in range(BATCH):
            alone = [f[row : row + 1] if there[row, k] else None for k, f in enumerate(features)]
            expected, share = module(alone)
            _same_as_far(fused[row : row + 1], expected)
            torch.testing.assert_close(weights[row : row + 1], share)


def check_missing_tokens(name: str, claims: Claims) -> None:
    """Tokens that are masked don't matter; where none is left the result is finite and all weights are 0."""
    module, features = make_fusion(name, claims), some_features(TOKENS)
    there = [torch.ones(BATCH, TOKENS, dtype=torch.bool) for _ in WIDTHS]
    for mask in there:
        mask[:, -1] = False
        mask[0] = False
    fused, weights = module(features, there)
    assert fused.isfinite().all(), "nothing is there, and the result isn't finite"
    assert (weights[0] == 0).all(), f"nothing is there, and the weights are {weights[0].tolist()}"
    changed = [f.clone() for f in features]
    for feature in changed:
        feature[:, -1] = torch.nan
    again, share = module(changed, there)
    torch.testing.assert_close(again, fused)
    torch.testing.assert_close(share, weights)
    short, fewer = module([f[1:, :-1] for f in features])
    torch.testing.assert_close(fused[1:] if fused.ndim == 2 else fused[1:, :-1], short)
    torch.testing.assert_close(weights[1:], fewer)


def check_missing_inputs(name: str, claims: Claims) -> None:
    """In a `ModelFusion` of networks with inputs of their own, one that is missing is never read, and its token learns."""
    batch = {f"m{k}": f for k, f in enumerate(some_features())}
    plain, tokens = _networks(name, claims), _networks(name, claims, missing="token")
    for fusion in (plain, tokens):
        assert torch.equal(fusion(batch), plain(batch)), "a token changes what all inputs give"
        there = torch.arange(BATCH) % 2 == 0
        marked = {**batch, "present": {"m1": there}}
        expected = fusion(marked)
        changed = batch["m1"].masked_fill(~there.unsqueeze(1), torch.nan)
        assert torch.equal(fusion({**marked, "m1": changed}), expected), "an input that is missing matters"
        _same_as_far(expected[there], fusion(batch)[there])
        gone = {key: value for key, value in batch.items() if key != "m1"}
        _same_as_far(expected[~there], fusion(gone)[~there])
        assert torch.equal(fusion({**batch, "m1": None}), fusion(gone))
    expected.square().sum().backward()
    assert tokens.tokens is not None
    learns = [token.grad is not None and bool(token.grad.abs().max() > 0) for token in tokens.tokens]
    assert learns == [False, True, False], f"gradients reach the tokens {learns}, where one input is missing"
    dropping = _networks(name, claims, branch_dropout=0.5)
    assert torch.equal(dropping(batch), plain(batch)), "branch dropout is at work in evaluation"
    dropping.train()
    assert dropping.tokens is not None
    torch.stack([dropping(batch).square().sum() for _ in range(8)]).sum().backward()
    assert all(token.grad is not None and token.grad.abs().max() > 0 for token in dropping.tokens), "nothing is dropped"


def _networks(name: str, claims: Claims, **options: Any) -> ModelFusion:
    """A fusion of networks m0, m1, m2, each with an input as wide as its features, and no parameter at a special value."""
    torch.manual_seed(0)
    networks = {f"m{k}": nn.Sequential(nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 3)) for k, w in enumerate(WIDTHS)}
    example = {f"m{k}": f for k, f in enumerate(some_features())}
    module = ModelFusion(networks, name, DIM, 3, example=example, **claims.options, **options)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for label, parameter in module.named_parameters():
            if not label.startswith("tokens"):
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    return module.eval()


def check_modes(name: str, claims: Claims) -> None:
    """Evaluation gives the same each time; dropout, where the method has it, is at work in training alone."""
    module, features = make_fusion(name, claims), some_features()
    assert torch.equal(module(features)[0], module(features)[0]), "evaluation differs from call to call"
    if "dropout" not in find(name, "features").options.model_fields:
        return
    dropped, never = make_fusion(name, claims, dropout=0.5), make_fusion(name, claims, dropout=0.0)
    torch.testing.assert_close(dropped(features)[0], never(features)[0])
    dropped.train()
    assert not torch.equal(dropped(features)[0], dropped(features)[0]), "dropout does nothing in training"
    never.train()
    assert torch.equal(never(features)[0], never(features)[0]), "training differs from call to call without dropout"


def check_half_precision(name: str, claims: Claims) -> None:
    """float16 and bfloat16 run, are finite, and are near float32; so is autocast."""
    module = make_fusion(name, claims)
    for features in (some_features(), some_features(TOKENS)):
        fused, weights = module(features)
        for dtype, near in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
            low, share = copy.deepcopy(module).to(dtype)([f.to(dtype) for f in features])
            assert low.dtype == dtype
            torch.testing.assert_close(low.float(), fused, rtol=near, atol=near)
            torch.testing.assert_close(share.float(), weights, rtol=near, atol=near)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(features)[0].float(), fused, rtol=0.15, atol=0.15)


def check_compile(name: str, claims: Claims) -> None:
    """`torch.compile` traces the module whole, and it computes the same."""
    module = make_fusion(name, claims)
    for features in (some_features(), some_features(TOKENS)):
        torch.compiler.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for result, expected in zip(compiled(features), module(features), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def check_export(name: str, claims: Claims) -> None:
    """`torch.export` gives a program that computes the same, for batches of other sizes too."""
    module, automatic = make_fusion(name, claims), torch.export.Dim.AUTO
    for features in (some_features(), some_features(TOKENS)):
        shapes = ([{0: automatic} for _ in features],)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, which come and go with torch's version
            program = torch.export.export(module, (features,), dynamic_shapes=shapes, strict=False).module()
        for given in (features, [f[:2] for f in features]):
            for result, expected in zip(program(given), module(given), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def check_state(name: str, claims: Claims) -> None:
    """The state goes through safetensors bit by bit into a module made anew, which then computes the same."""
    module, features = make_fusion(name, claims), some_features()
    state = load(save({key: value.contiguous() for key, value in module.state_dict().items()}))
    anew: nn.Module = find(name, "features").make(WIDTHS, DIM, **claims.options).eval()
    anew.load_state_dict(state)
    for result, expected in zip(anew(features), module(features), strict=True):
        assert torch.equal(result, expected), "the module isn't in its state_dict wholly"
    clone = copy.deepcopy(module)
    assert torch.equal(clone(features)[0], module(features)[0]), "a deep copy differs"


def check_refusals(name: str, claims: Claims) -> None:
    """Features that don't fit are a `ModelError` that names which, and the shape or number that was given."""
    module, features = make_fusion(name, claims), some_features()
    with _refused("features: 2 given for 3 models"):
        module(features[:2])
    with _refused("all models are missing"):
        module([None] * len(WIDTHS))
    with _refused("features[1]: got shape (5, 11)"):
        module([features[0], torch.zeros(BATCH, WIDTHS[1] + 1), features[2]])
    with _refused("features[0]: got shape (5, 1, 1, 6)"):
        module([torch.zeros(BATCH, 1, 1, WIDTHS[0]), *features[1:]])
    with _refused("features[2]: got shape (4,)"):
        module([*features[:2], torch.zeros(WIDTHS[2])])
    with _refused("features[2]: got shape (4, 4)"):
        module([*features[:2], features[2][:4]])
    with _refused("present: 1 given for 3 models"):
        module(features, [None])
    with _refused("present[0]: got shape (4,)"):
        module(features, [torch.ones(4, dtype=torch.bool), None, None])


#: Every promise, in the order they are checked.
FUSION_CHECKS: tuple[Check, ...] = (
    check_shapes,
    check_unequal_tokens,
    check_weights,
    check_gradients,
    check_permutation,
    check_missing_model,
    check_missing_rows,
    check_missing_tokens,
    check_missing_inputs,
    check_modes,
    check_half_precision,
    check_compile,
    check_export,
    check_state,
    check_refusals,
)


def _all_kinds(claims: Claims) -> list[list[Tensor]]:
    return [some_features(), some_features(TOKENS), *([some_features([2, 4, 1])] if claims.unequal_tokens else [])]


def _same_as_far(fused: Tensor, expected: Tensor) -> None:
    """Equal, to float32's rounding."""
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def _refused(message: str) -> Iterator[None]:
    said = "nothing"
    try:
        yield
    except ModelError as error:
        said = str(error)
    assert message in said, f"the error says {said!r}, not {message!r}"
