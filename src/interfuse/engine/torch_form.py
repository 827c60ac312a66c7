"""What the compiled kernels compute, in torch: for GPUs, and for gradients through a merge. One tensor whole, no blocks.

The same formulas in the same order: equal bits where the kernels' arithmetic is entry by entry, chance and exact selection
included; where sums over a tensor come in (Gram matrices, norms) they may differ in the last place. Methods of whole
matrices run here by their own functions; those of blocks are NumPy's, and aren't here. Nothing is read or written, and torch
is imported when a function is called. Sources are those of `methods` and of `engine.loops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interfuse.checkpoints.source import BLOCK
from interfuse.engine.rules import kept, keys_of
from interfuse.methods.forms import Combination, Rule, Trim
from interfuse.methods.geodesic import AXIS
from interfuse.plan import Call
from interfuse.registry import Method, find

if TYPE_CHECKING:
    from torch import Tensor

_SCALE = 2.0**-24
_PART = 2**24  # elements whose chance is drawn at a time, for the whole numbers that it takes
_ROW_BUCKETS, _BUCKETS = 2**11, 2**15  # as in the kernels: of a row that fits a block, of a longer one


class Tail(NamedTuple):
    """Where a model's trim ends that is over more than one tensor: all above `value`, those at it below index `end`."""

    value: float
    end: int


def supports(call: Call) -> bool:
    """Whether a tensor of this method can be merged here: all but methods of blocks."""
    return call.form in ("coefficients", "rule", "matrices")


def merged(
    call: Call, name: str, base: Tensor | None, models: Sequence[Tensor], *, seed: int = 0, cuts: Sequence[Tail] | None = None
) -> Tensor:
    """One tensor's merge, not yet rounded, from float32 or float64 tensors of one shape and device.

    `name` is the output's, which chance is drawn by; `cuts` are those of a trim over the whole model. It has gradients with
    respect to the tensors, but for what is selected.
    """
    if not models[0].numel():
        return models[0]
    if call.form == "rule":
        assert isinstance(call.made, Rule)
        return ruled(call.made, base, models, keys=keys_of(seed, name, len(models)), cuts=cuts)
    if call.form == "matrices":
        return _by_matrix(call, name, base, models, seed)
    combination = call.made if isinstance(call.made, Combination) else None
    if combination is None:
        method = find(call.method, "weights")
        axis = AXIS[call.method](dict(call.options)) if call.method in AXIS and models[0].ndim > 1 else None
        if axis is not None:
            return _by_axis(call, method, axis, base, models)
        vectors = [model - base for model in models] if method.of == "deltas" and base is not None else list(models)
        if method.of == "models" and base is not None:
            vectors.insert(0, base)
        combination = method.make(call.weights, gram(vectors).cpu().numpy(), **dict(call.options))
    assert isinstance(combination, Combination)
    inputs, shares = list(models), list(combination.models)
    if base is not None:
        inputs, shares = [base, *inputs], [combination.base, *shares]
    return weighted_sum(inputs, shares, combination.total - (0 if base is not None else combination.base))


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """The inner products of tensors of one shape, float64 `[M, M]`."""
    import torch

    flat = torch.stack([vector.detach().reshape(-1).double() for vector in vectors])
    return flat @ flat.T


def weighted_sum(inputs: Sequence[Tensor], coefficients: Sequence[Any], total: Any) -> Tensor:
    """sum c_i t_i for coefficients, numbers or tensors of no axis, that sum to `total`: equal inputs cancel exactly.

    Written as total t_0 + sum c_i (t_i - t_0) from the input t_0 with the largest share. `total` must be their sum for
    gradients too: 1 where the base's share is 1 less the others.
    """
    import torch

    shares = [(tensor, c) for tensor, c in zip(inputs, coefficients, strict=True) if _plain(c) != 0 or _traced(c)]
    if not shares:
        return torch.zeros_like(inputs[0])
    terms = sorted(shares, key=lambda term: -abs(_plain(term[1])))
    anchor = terms[0][0]
    result = _number(total, anchor) * anchor
    for tensor, c in terms[1:]:
        # The differences are +0 where inputs are equal, and subtracted: a -0 then keeps its sign.
        if _plain(c) > 0:
            result = result - _number(c, anchor) * (anchor - tensor)
        else:
            result = result - _number(-c, anchor) * (tensor - anchor)
    if bool(torch.isfinite(result).all()):
        return result
    plain = torch.zeros_like(anchor)  # a difference may overflow where the sum doesn't
    for tensor, c in terms:
        plain = plain + tensor * _number(c, anchor)
    return torch.where(torch.isfinite(result), result, plain)


def added(base: Tensor, models: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """base + sum c_i (t_i - base) for a tensor of coefficients `[M]`, with gradients: task arithmetic to be learned."""
    return weighted_sum([base, *models], [1 - coefficients.sum(), *coefficients.unbind()], 1.0)


def ruled(
    rule: Rule,
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    keys: np.ndarray,
    weights: Tensor | None = None,
    scale: Any = None,
    cuts: Sequence[Tail] | None = None,
) -> Tensor:
    """Trim, elect, scale. `weights` `[M]` and `scale` stand in place of the rule's numbers, and have gradients.

    `keys` are `engine.rules.keys_of`'s: the same chance as on a CPU. What is trimmed and elected is chosen, and has none.
    """
    import torch

    anchor = models[0]
    deltas = [model - base for model in models] if base is not None else list(models)
    values = _trimmed(rule.trim, deltas, keys, cuts)
    own = torch.tensor(rule.weights, dtype=torch.float64, device=anchor.device) if weights is None else weights.double()
    votes, scales, own = _scales(rule, deltas, values, own)
    votes, scales, own = (numbers.to(anchor.dtype) for numbers in (votes, scales, own))
    if rule.elect:
        result = _elected(values, votes, scales, own, mean=rule.mean)
    else:
        result = _summed(values, scales)
    start = torch.zeros_like(anchor) if base is None else base
    return start + _number(rule.scale if scale is None else scale, anchor) * result


def _summed(values: Sequence[Tensor], scales: Tensor) -> Tensor:
    result = scales[0] * values[0]
    for value, scale in zip(values[1:], scales[1:], strict=True):
        result = result + scale * value
    return result


def _elected(values: Sequence[Tensor], votes: Tensor, scales: Tensor, weights: Tensor, *, mean: bool) -> Tensor:
    """The sum, or weighted mean, of the entries that have the sign of the votes' sum; 0 counts as plus."""
    import torch

    positive = _summed([value.detach() for value in values], votes.detach()) >= 0
    result, divisor = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for value, vote, scale, weight in zip(values, votes, scales, weights, strict=True):
        signed = value.detach() * torch.sign(vote.detach())
        agrees = torch.where(positive, signed > 0, signed < 0)
        result = result + torch.where(agrees, scale * value, 0)
        if mean:
            divisor = divisor + torch.where(agrees, weight, 0)
    return result / torch.where(divisor != 0, divisor, 1) if mean else result


def _scales(rule: Rule, deltas: Sequence[Tensor], values: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What votes, sums and means multiply or divide each model by, float64 `[M]`."""
    import torch

    factors = torch.ones_like(weights)
    if rule.trim.rescale == "l1":
        before, after = (torch.stack([v.detach().abs().double().sum() for v in part]) for part in (deltas, values))
        factors = torch.where(after > 0, before / torch.where(after > 0, after, 1), 1)
    elif rule.trim.rescale == "density" and rule.trim.how == "random":
        factors = torch.tensor([1 / d if d > 0 else 1.0 for d in rule.trim.density], dtype=torch.float64, device=weights.device)
    if not rule.energy:
        return weights * factors, weights * factors, weights
    squares = torch.stack([value.detach().double().square().sum() for value in values])
    whole = squares.sum()
    weights = weights * torch.where(whole > 0, squares / torch.where(whole > 0, whole, 1), 1 / len(values))
    return torch.ones_like(weights), weights, weights


def _trimmed(trim: Trim, deltas: Sequence[Tensor], keys: np.ndarray, cuts: Sequence[Tail] | None) -> list[Tensor]:
    """The deltas with what isn't kept at 0."""
    import torch

    count = deltas[0].numel()
    if not count or trim.how == "all":
        return list(deltas)
    if trim.how == "ranked":
        return [_ranked(trim, k, delta, keys[k]) for k, delta in enumerate(deltas)]
    if trim.how == "random":
        masks = [_drawn(count, keys[k], np.float32(d), deltas[k]) for k, d in enumerate(trim.density)]
    elif trim.how == "variance":
        scores = _variance(deltas).reshape(-1)
        places = int((scores > 0).sum())
        masks = [_largest(scores, math.floor(trim.density[0] * places))] * len(deltas)
    elif cuts is not None:
        masks = [_above(delta.detach().abs().reshape(-1), cut) for delta, cut in zip(deltas, cuts, strict=True)]
    else:
        masks = []
        for k, delta in enumerate(deltas):
            target = kept(trim.density[k], count) if trim.density[k] < 1 else count
            skip = min(math.floor((trim.skip or (0.0,) * len(deltas))[k] * count), count - target)
            sizes = delta.detach().abs().reshape(-1)
            masks.append(_largest(sizes, skip + target) & ~_largest(sizes, skip))
    return [torch.where(mask.reshape(delta.shape), delta, 0) for mask, delta in zip(masks, deltas, strict=True)]


def _largest(sizes: Tensor, keep: int) -> Tensor:
    """Where the `keep` largest of `[n]` are, equal ones by lowest index: exact, and no sort."""
    import torch

    count = len(sizes)
    if keep <= 0 or keep >= count:
        return torch.full_like(sizes, keep > 0, dtype=torch.bool)
    cut = torch.kthvalue(sizes, count - keep + 1).values
    above, at = sizes > cut, sizes == cut
    return above | (at & (at.cumsum(0) <= keep - above.sum()))


def _above(sizes: Tensor, cut: Tail) -> Tensor:
    mask: Tensor = sizes > cut.value
    mask[: cut.end] |= sizes[: cut.end] == cut.value
    return mask


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """The variance over the models at each place, in the kernels' order."""
    import torch

    mean, result = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        mean = mean + delta.detach()
    mean = mean / len(deltas)
    for delta in deltas:
        result = result + (delta.detach() - mean) * (delta.detach() - mean)
    return result


def chances_drawn(count: int, key: np.ndarray, device: Any, start: int = 0) -> Tensor:
    """The kernels' number in [0, 1) for each of `count` entries from index `start` on: float32, from `key` uint32 `[2]`."""
    import torch

    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    by = _mix((_mix(((index >> 32) + int(key[0])) & _MASK) + int(key[1])) & _MASK)
    drawn = _mix((index & _MASK) ^ by)
    return (drawn >> 8).to(torch.float32) * _SCALE


def _drawn(count: int, key: np.ndarray, chance: Any, like: Tensor) -> Tensor:
    """Where entries are kept, each with that chance: a number, or float32 `[n]`."""
    import torch

    parts = []
    for start in range(0, count, _PART):
        part = chances_drawn(min(_PART, count - start), key, like.device, start)
        parts.append(part < (chance[start : start + _PART] if torch.is_tensor(chance) else float(chance)))
    return torch.cat(parts)


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The kernels' bijection of 32 bits, in the lower half of int64."""
    x = x ^ (x >> 16)
    x = _times(x, 0x21F0AAAD)
    x = x ^ (x >> 15)
    x = _times(x, 0xD35A2D97)
    return x ^ (x >> 15)


def _times(x: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product, of which no part leaves int64."""
    return ((((x * (factor >> 16)) & 0xFFFF) << 16) + x * (factor & 0xFFFF)) & _MASK


def _ranked(trim: Trim, model: int, delta: Tensor, key: np.ndarray) -> Tensor:
    """DELLA's trim of one delta: an entry's chance rises with the mean rank, in its row, of magnitudes like its own."""
    import torch

    width = max(delta.shape[-1], 1) if delta.ndim else 1
    rows = delta.detach().reshape(-1, width)
    buckets = _ROW_BUCKETS if width <= BLOCK else _BUCKETS
    density, spread = np.float32(trim.density[model]), np.float32(trim.spread[model])
    slope = np.float32(2 * spread / np.float64(max(width - 1, 1)))
    least = np.float32(density - spread if width > 1 else density)
    each = max(1, _PART // max(width, buckets))
    found = []
    for part in rows.split(each):
        place = (part.abs().to(torch.float32).view(torch.int32) >> 16).to(torch.int64)
        if width <= BLOCK:
            place = (place - (place.amax(1, keepdim=True) - (buckets - 1)).clamp(min=0)).clamp(min=0)
        counts = torch.zeros(len(part), buckets, dtype=torch.int64, device=delta.device)
        counts.scatter_add_(1, place, torch.ones_like(place))
        twice = 2 * counts.cumsum(1) - counts - 1  # the mean rank of a bucket, doubled
        step = torch.tensor(slope * np.float32(0.5), device=delta.device)
        table = torch.tensor(least, device=delta.device) + step * twice.to(torch.float32)
        found.append(table.gather(1, place))
    chances = torch.cat(found).reshape(-1)
    mask = _drawn(delta.numel(), key, chances, delta).reshape(delta.shape)
    values = torch.where(mask, delta, 0)
    divisors = chances.clamp(min=2.0**-100).to(delta.dtype).reshape(delta.shape)  # a chance of 0 keeps nothing
    return values / divisors if trim.rescale == "density" else values


def _by_matrix(call: Call, name: str, base: Tensor | None, models: Sequence[Tensor], seed: int) -> Tensor:
    """A method of whole matrices, by its own function: on `[M, out, in]`."""
    import torch

    options = dict(call.options)
    if "seed" in options:
        options["seed"] = (options["seed"] + int(keys_of(seed, name, 1)[0, 0])) % 2**31
    deltas = torch.stack([(one if base is None else one - base).reshape(one.shape[0], -1) for one in models])
    if bool(torch.isfinite(deltas).all()):
        delta = find(call.method, "weights").make(deltas, call.weights, **options)
    else:
        delta = deltas.mean(0)
    found: Tensor = delta.reshape(models[0].shape)
    return found if base is None else base + found


def _by_axis(call: Call, method: Method, axis: int, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Coefficients for each vector along an axis: the last (rows), or the first (columns)."""
    import torch

    width = models[0][0].numel() if axis == 0 else models[0].shape[-1]
    reads = [*([] if base is None else [base]), *models]
    values = torch.stack([tensor.double().reshape(-1, width) for tensor in reads])
    vectors = values if base is None else values[1:] - values[0]
    products = torch.einsum("arc,brc->cab" if axis == 0 else "arc,brc->rab", vectors, vectors)
    combination = method.make(call.weights, products.detach().cpu().numpy(), **dict(call.options))
    shares = [*([] if base is None else [combination.base]), *combination.models]
    size = values.shape[2] if axis == 0 else values.shape[1]
    spread = [torch.from_numpy(np.array(np.broadcast_to(share, size), np.float64)).to(values.device) for share in shares]
    spread = [share if axis == 0 else share[:, None] for share in spread]
    return torch.stack([share * value for share, value in zip(spread, values, strict=True)]).sum(0).reshape(models[0].shape)


def rounded(values: Tensor, dtype: str) -> Tensor:
    """In the type that safetensors calls `dtype`, rounded once to the nearest, ties to even."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if values.dtype == torch.float64 and dtype in ("F16", "BF16"):
        near = values.to(torch.float32)
        back = near.double()
        inexact = torch.isfinite(values) & torch.isfinite(near) & (back != values)
        bits = near.view(torch.int32) - (inexact & (back.abs() > values.abs())).to(torch.int32)
        values = (bits | inexact.to(torch.int32)).view(torch.float32)  # an odd last place: the next rounding is the only one
    return values.to(kinds[dtype])


def _number(value: Any, like: Tensor) -> Tensor:
    """A number as a tensor of no axis, in the arithmetic's type."""
    import torch

    return (
        torch.as_tensor(value, device=like.device).to(like.dtype) if torch.is_tensor(value) else like.new_tensor(float(value))
    )


def _plain(value: Any) -> float:
    return float(value.detach()) if hasattr(value, "detach") else float(value)


def _traced(value: Any) -> bool:
    return bool(getattr(value, "requires_grad", False))
