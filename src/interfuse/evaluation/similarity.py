"""How alike two networks' layers are: a map of all pairs, by CKA or by how well one layer's features give the other's.

    CKA(i, j) = sum_batches H(K_i, L_j) / sqrt( sum_batches H(K_i, K_i) * sum_batches H(L_j, L_j) ),    K = X X'
    H(K, L) = ( tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'K L 1 ) / (n(n-3)),    K and L with zeros as their diagonals

Linear centred kernel alignment (Kornblith et al. 2019, 1905.00414) with the unbiased estimate of HSIC on each batch of n
examples (Nguyen et al. 2021, 2010.15327, section 2), so that it is streamed and doesn't depend on the batches' size but for
noise. 1 for features that are equal but for rotation and scale, about 0 for unrelated ones (it may be a little below).

Stitching: 1 - error of the least-squares affine map from i to j (Csiszarik et al. 2021, 2110.14633) on every fifth example,
which it wasn't fitted to; it isn't symmetric. This says nothing of what a stitched network predicts: that is `transfer.stitch`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from interfuse.errors import DataError, ModelError, OptionError, Problem, UserError, nearest
from interfuse.extras import require
from interfuse.inference.batches import batches, first, in_order, length
from interfuse.modules.inputs import batch_size as size_of
from interfuse.modules.inputs import call, inputs_by_model, move, split_batch
from interfuse.modules.least_squares import Moments
from interfuse.modules.places import join, layout_of
from interfuse.modules.taps import quiet, tensor_of, token_mask
from interfuse.progress import track

MEASURES = ("cka", "stitching")
_NAMES = ("a", "b")
_HELD_OUT = 5  # every fifth example
_RIDGE = 1e-6  # as in `transfer.stitch`

_CHAINS = (nn.Sequential, nn.ModuleList)
#: In evaluation they give what they get.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

#: What is done at once with what a layer gives, before a later one may change it in place.
Take = Callable[[Tensor, Any, nn.Module], Tensor]


@dataclass(frozen=True)
class Similarity:
    """A map of two networks: `matrix[i][j]` is how alike layer i of `a` and layer j of `b` are, 1 for equal ones."""

    measure: str
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    examples: int

    def best(self) -> dict[str, tuple[str, float]]:
        """For each layer of `a` the layer of `b` that is most like it, and how much."""
        rows = (max(range(len(row)), key=row.__getitem__) for row in self.matrix)
        return {
            name: (self.layers_b[j], self.matrix[i][j]) for i, (name, j) in enumerate(zip(self.layers_a, rows, strict=True))
        }

    def draw(self, axes: Any, *, a: str = "a", b: str = "b") -> Any:
        """The map on matplotlib's `axes`, from 0 to 1: a's layers from below up, b's from left to right."""
        image = axes.imshow(self.matrix, vmin=0, vmax=1, cmap="magma", origin="lower", aspect="auto")
        for axis, name, layers in ((axes.xaxis, b, self.layers_b), (axes.yaxis, a, self.layers_a)):
            step = -(-len(layers) // 24)
            axis.set_ticks(range(0, len(layers), step), [layers[i] for i in range(0, len(layers), step)], parse_math=False)
            axis.set_label_text(name, parse_math=False)
        axes.tick_params(length=0, labelsize=8)
        axes.tick_params(axis="x", rotation=90)
        return image

    def save_figure(self, path: str | Path, *, a: str = "a", b: str = "b") -> Path:
        """Write the map as a picture (svg, png, pdf, by the ending); a, b: what the networks are called in it."""
        require("matplotlib")
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        what = "linear CKA" if self.measure == "cka" else "1 - stitching error"
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "similarity"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*[Gg]lyph")
            across, up = (min(9.0, 2.2 + 0.22 * len(layers)) for layers in (self.layers_b, self.layers_a))
            figure = Figure(figsize=(across + 1, up), layout="constrained")
            FigureCanvasAgg(figure)
            image = self.draw(figure.add_subplot(), a=a, b=b)
            figure.colorbar(image, label=f"{what}, {self.examples:,} examples")
            plain = {"Date": None, "Creator": None} if Path(path).suffix == ".svg" else None
            figure.savefig(path, metadata=plain)
        return Path(path)


def similarity(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    layers_a: Sequence[str] | None = None,
    layers_b: Sequence[str] | None = None,
    measure: str = "cka",
    batch_size: int = 64,
    progress: bool = True,
) -> Similarity:
    """Compare all layers of two networks (of any families; one network with itself too) on unlabelled samples.

    data: a tensor, or what `predict` reads; both networks get the same, or {"a": ..., "b": ...}. Tokens that an attention mask
        leaves out don't count.
    layers_a, layers_b: modules' paths; None is every block and every layer outside of blocks that runs once and gives
        features, in the order they run.
    measure: "cka", or "stitching": 1 - the error of the affine map from a's to b's features on examples that it wasn't fitted
        to (memory: width of a times the widths of a and b, for every pair of layers).
    batch_size: at least 4, more being better, where `data` isn't in batches already; smaller batches are left out of CKA.

    Raises `ModelError` naming every layer that isn't there or gives no features, `OptionError` and `DataError`.
    """
    if measure not in MEASURES:
        raise OptionError(Problem("measure", f"got {measure!r}", nearest(str(measure), MEASURES)))
    loader = batches(TensorDataset(data) if isinstance(data, Tensor) else data, batch_size)
    example = inputs_by_model(_NAMES, split_batch(first(loader))[0])
    layers: list[list[str]] = []
    problems: list[Problem] = []
    for name, network, own, asked in zip(_NAMES, (a, b), example, (layers_a, layers_b), strict=True):
        try:
            layers.append(_layers(network, own, asked, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise ModelError(*problems)
    compare = _cka if measure == "cka" else _stitching
    shown = track(in_order(loader), "comparing layers", length(loader), shown=progress)
    matrix, examples = compare((a, b), layers, (inputs_by_model(_NAMES, split_batch(batch)[0]) for batch in shown))
    rows = tuple(tuple(float(value) for value in row) for row in matrix)
    return Similarity(measure, tuple(layers[0]), tuple(layers[1]), rows, examples)


def _layers(network: nn.Module, inputs: Any, asked: Sequence[str] | None, name: str) -> list[str]:
    """The layers to compare: those asked for, or those that there are, in the order they run."""
    modules = dict(network.named_modules(remove_duplicate=False))
    unknown = [
        Problem(f"layers_{name}", f"no module at {path!r}", nearest(path, [m for m in modules if m]))
        for path in asked or ()
        if path not in modules
    ]
    if unknown:
        raise ModelError(*unknown)
    ran: list[str] = []
    fits: dict[str, Problem | None] = {}

    def note(tensor: Any, path: str) -> None:
        ran.append(path)
        try:
            layout_of(tensor_of(tensor, name), inputs, modules[path], name)
            fits[path] = None
        except ModelError as error:
            fits[path] = error.problems[0]

    with _hooked(network, asked or list(_blocks(network)), note):
        call(network, _placed(inputs, network), name)
    if asked is None:
        found = [path for path in ran if ran.count(path) == 1 and fits[path] is None]
        if not found:
            raise ModelError(Problem(f"layers_{name}", "no layers with features were found", "name modules"))
        return found
    _check_layers(asked, ran, fits, name)
    return list(asked)


def _check_layers(asked: Sequence[str], ran: Sequence[str], fits: dict[str, Problem | None], name: str) -> None:
    problems = []
    for path in asked:
        if ran.count(path) != 1:
            problems.append(Problem(f"layers_{name}", f"{path!r} runs {ran.count(path)} times", "layers that run once"))
        elif misfit := fits[path]:
            problems.append(Problem(f"layers_{name}", f"{path!r}: {misfit.wrong}", "layers that give features of each example"))
    if problems:
        raise ModelError(*problems)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of blocks (several of one class in a list or chain) and of layers outside of them, but for what does nothing."""
    kinds = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        block = isinstance(module, _CHAINS) and not isinstance(child, _CHAINS) and kinds[type(child)] > 1
        if isinstance(child, _IDLE):
            continue
        if block or not list(child.children()):
            yield path
        else:
            yield from _blocks(child, f"{path}.")


@contextmanager
def _hooked(network: nn.Module, paths: Sequence[str], note: Callable[[Any, str], None]) -> Iterator[None]:
    """`note(what the module gives, its path)` at every run, in evaluation mode."""
    modules = dict(network.named_modules(remove_duplicate=False))
    handles = [
        modules[path].register_forward_hook(lambda _module, _args, result, path=path: note(result, path)) for path in paths
    ]
    try:
        with quiet(network):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _placed(inputs: Any, network: nn.Module) -> Any:
    parameter = next(network.parameters(), None)
    return inputs if parameter is None else move(inputs, parameter.device)


def _features(network: nn.Module, paths: Sequence[str], inputs: Any, take: Take, name: str) -> list[Tensor]:
    """What `take` makes of each layer's features in one pass."""
    taken: dict[str, Tensor] = {}
    modules = dict(network.named_modules(remove_duplicate=False))

    def note(result: Any, path: str) -> None:
        taken[path] = take(tensor_of(result, name), inputs, modules[path])

    with _hooked(network, paths, note):
        call(network, _placed(inputs, network), name)
    return [taken[path] for path in paths]


def _both(networks: Sequence[nn.Module], layers: Sequence[list[str]], inputs: Sequence[Any], take: Take) -> list[list[Tensor]]:
    each = zip(networks, layers, inputs, _NAMES, strict=True)
    return [_features(network, paths, own, take, name) for network, paths, own, name in each]


def _gram(tensor: Tensor, inputs: Any, module: nn.Module) -> Tensor:
    """K = X X' (n, n) with zeros as its diagonal, in float64; centred first, which changes nothing but the rounding."""
    arranged = layout_of(tensor, inputs, module).arranged(tensor)
    mask = token_mask(inputs, arranged) if arranged.ndim == 3 else None
    if mask is not None:
        arranged = torch.where(mask.unsqueeze(-1), arranged, 0)
    x = arranged.flatten(1).double().cpu()
    x = x - x.mean(dim=0)
    return (x @ x.T).fill_diagonal_(0)


def unbiased_hsic(first_grams: Tensor, second_grams: Tensor) -> Tensor:
    """H of all pairs: (p, n, n) and (q, n, n), symmetric with zeros as diagonals -> (p, q). n is at least 4."""
    n = first_grams.shape[-1]
    one, two = first_grams.sum(dim=-1), second_grams.sum(dim=-1)
    traces = first_grams.flatten(1) @ second_grams.flatten(1).T
    totals = torch.outer(one.sum(dim=-1), two.sum(dim=-1)) / ((n - 1) * (n - 2))
    return (traces + totals - 2 / (n - 2) * one @ two.T) / (n * (n - 3))


def _cka(networks: Sequence[nn.Module], layers: Sequence[list[str]], data: Iterable[list[Any]]) -> tuple[Tensor, int]:
    across, own, examples = torch.zeros(()).double(), [torch.zeros(()).double() for _ in _NAMES], 0
    for inputs in data:
        if size_of(inputs[0]) < 4:
            continue
        examples += size_of(inputs[0])
        grams = [torch.stack(found) for found in _both(networks, layers, inputs, _gram)]
        across = across + unbiased_hsic(grams[0], grams[1])
        own = [total + unbiased_hsic(g, g).diagonal() for total, g in zip(own, grams, strict=True)]
    if not examples:
        raise DataError(Problem("data", "no batch has 4 examples or more", "larger batches"))
    scale = torch.outer(own[0], own[1]).clamp(min=0).sqrt()
    return torch.where(scale > 0, across / scale.where(scale > 0, torch.ones(()).double()), 0.0), examples


def _whole(tensor: Tensor, inputs: Any, module: nn.Module) -> Tensor:
    return layout_of(tensor, inputs, module).arranged(tensor).double().cpu()


def _rows_kept(y: Tensor, inputs: Any, chosen: Tensor) -> Tensor:
    """Which rows of y (batch, places ..., width) are of the chosen examples, and of tokens that an attention mask keeps."""
    mask = token_mask(inputs, y) if y.ndim == 3 else None
    rows = chosen.reshape(-1, *[1] * (y.ndim - 2)).expand(y.shape[:-1])
    return rows if mask is None else rows & mask


def _stitching(networks: Sequence[nn.Module], layers: Sequence[list[str]], data: Iterable[list[Any]]) -> tuple[Tensor, int]:
    pairs = [[(Moments(), Moments()) for _ in layers[1]] for _ in layers[0]]
    examples = 0
    for inputs in data:
        size = size_of(inputs[0])
        held = torch.arange(examples, examples + size) % _HELD_OUT == _HELD_OUT - 1
        examples += size
        xs, ys = _both(networks, layers, inputs, _whole)
        for row, x in zip(pairs, xs, strict=True):
            for (fitting, held_out), y in zip(row, ys, strict=True):
                moved = join(x, tuple(y.shape[1:-1]))
                for moments, chosen in ((fitting, ~held), (held_out, held)):
                    rows = _rows_kept(y, inputs[1], chosen)
                    moments.add(moved[rows], y[rows])
    if examples < _HELD_OUT:
        raise DataError(Problem("data", f"{examples} examples", f"at least {_HELD_OUT}: every fifth is held out"))
    errors = [[held_out.error(*fitting.solve(_RIDGE)) for fitting, held_out in row] for row in pairs]
    return 1 - torch.tensor(errors, dtype=torch.float64), examples
