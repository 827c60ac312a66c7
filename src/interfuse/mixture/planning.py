"""A mixture's recipe and its models' headers in, a plan for the merge engine out: which tensor is copied from where.

Pure: everything wrong with the models is found here and raised at once. What no file holds (routers, biases that are zero, a
shared expert that adds nothing) comes from a source in memory, with the shapes told here and the values by `gates`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from interfuse.checkpoints.numbers import FLOATS, STORED_FLOATS, float_named
from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.errors import CheckpointError, OptionError, Problem, nearest
from interfuse.methods.calls import COPY, Call, make_call
from interfuse.mixture.layouts import (
    LAYOUTS,
    NEUTRAL_WIDTH,
    PARTS,
    Config,
    Layout,
    config_problems,
    layouts_named,
    mixture_config,
    with_defaults,
)
from interfuse.mixture.recipe import DRAWN, Expert, MixtureRecipe
from interfuse.plan import Input, Output, Plan, config_of
from interfuse.registry import find

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TOP = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
#: Buffers that old files hold, and that every library computes.
_COMPUTED = ("rotary_emb.inv_freq",)
_SHOWN = 5


@dataclass
class MixturePlan:
    """A mixture, decided: what the engine runs, and the config.json of what comes out.

    `plan`'s sources are the models in the order of `models` (the base first), and one more in memory: `made` has its
    tensors' shapes. `routers` has for each layer the name of its router there, `gates` those of the shared expert's gate.
    """

    plan: Plan
    layout: Layout
    config: Config
    models: tuple[str, ...]
    made: dict[str, TensorSpec]
    routers: tuple[str, ...]
    gates: tuple[str, ...]

    @property
    def experts(self) -> int:
        """How many experts each layer has."""
        return self.made[self.routers[0]].shape[0]


def plan_mixture(
    recipe: MixtureRecipe, base: Checkpoint, experts: Sequence[Checkpoint], shared: Checkpoint | None
) -> MixturePlan:
    """Everything that is wrong is one `CheckpointError`, or an `OptionError` where no layout fits what is asked for."""
    config = config_of(base)
    if config is None:
        raise CheckpointError(Problem(base.name, "has no config.json", "give the base as a folder with its config"))
    config = with_defaults(config)
    layout = _layout(recipe, str(config.get("model_type")), base.name)
    work = _Work(recipe, layout, base, experts, shared, config)
    work.problems += config_problems(layout, config, base.name)
    work.check_types()
    work.base()
    for layer in range(work.layers):
        work.layer(layer)
    if work.problems:
        raise CheckpointError(*dict.fromkeys(work.problems))
    types = list(dict.fromkeys(output.spec.dtype for output in work.outputs))
    dtype = next((name for name, stored in FLOATS.items() if [stored] == types), None)
    names = tuple(source.name for source in (base, *experts, *([] if shared is None else [shared])))
    plan = Plan("passthrough", (*names, "made here"), 0, tuple(work.outputs), (), recipe.seed, tuple(work.notes))
    made = mixture_config(
        layout, config, experts=len(experts), per_token=recipe.experts_per_token, shared=shared is not None, dtype=dtype
    )
    mixture = MixturePlan(plan, layout, made, names, work.made, tuple(work.routers), tuple(work.gates))
    mixture.plan = replace(plan, notes=(*plan.notes, *_notes(recipe, mixture)))
    return mixture


def _layout(recipe: MixtureRecipe, kind: str, base: str) -> Layout:
    """The layout that is asked for, or the first that fits."""
    known = list(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.accepts))
    if kind not in known:
        raise CheckpointError(Problem(base, f"model_type is {kind!r}", f"a dense model of {', '.join(known)}"))
    asked = layouts_named(recipe.architecture) if recipe.architecture is not None else list(LAYOUTS.values())
    fitting = [layout for layout in asked if kind in layout.accepts]
    if not fitting:
        wrong = f"{recipe.architecture!r} can't be made from {kind}"
        able = [name for name, layout in LAYOUTS.items() if kind in layout.accepts]
        raise OptionError(Problem("architecture", wrong, nearest("", able)))
    shared = recipe.shared
    chosen = [layout for layout in fitting if shared is None or layout.shared is not None]
    if shared is None:
        return chosen[0]
    gated = shared.positive_prompts is not None
    chosen = [layout for layout in chosen if layout.shared_gate is not None or not gated]
    if not chosen:
        names = ", ".join(layout.model_type for layout in fitting)
        wrong = f"{names} has no shared expert{' with a gate' if gated else ''}"
        allowed = "remove the prompts" if any(layout.shared for layout in fitting) else "remove it, or choose another base"
        raise OptionError(Problem("shared_experts", wrong, allowed))
    return chosen[0]


@dataclass
class _Work:
    """Gathers outputs and problems while the layers are gone through. A class, for what all steps have in common."""

    recipe: MixtureRecipe
    layout: Layout
    dense: Checkpoint
    experts: Sequence[Checkpoint]
    shared: Checkpoint | None
    config: Config
    outputs: list[Output] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made: dict[str, TensorSpec] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """How many layers the base has."""
        return int(self.config.get("num_hidden_layers") or 0)

    @property
    def apart(self) -> int:
        """The number of the source in memory."""
        return 1 + len(self.experts) + (self.shared is not None)

    def check_types(self) -> None:
        """Every expert is a model of the base's type, with its sizes."""
        kind, act = self.config.get("model_type"), self.config.get("hidden_act")
        for expert in [*self.experts, *([] if self.shared is None else [self.shared])]:
            config = config_of(expert)
            if config is None:
                continue  # a bare file of weights: its tensors speak for it
            config = with_defaults(config)
            if config.get("model_type") != kind:
                wrong = f"model_type is {config.get('model_type')!r}, the base's is {kind!r}"
                self.problems.append(Problem(expert.name, wrong, "give models of one architecture"))
            elif config.get("hidden_act") != act:
                wrong = f"hidden_act is {config.get('hidden_act')!r}, the base's is {act!r}"
                self.problems.append(Problem(expert.name, wrong, "give models of one architecture"))
            elif config.get("num_hidden_layers") != self.config.get("num_hidden_layers"):
                wrong = f"has {config.get('num_hidden_layers')} layers, the base has {self.layers}"
                self.problems.append(Problem(expert.name, wrong, "give models of one architecture"))

    def base(self) -> None:
        """Copy what is no layer's; say what the layout has no place for."""
        stray: list[str] = []
        computed: list[str] = []
        for name in self.dense.specs:
            match = _LAYER.fullmatch(name)
            if match is None:
                if name in _TOP:
                    self._copy(name, name)
                else:
                    (computed if name.endswith(_COMPUTED) else stray).append(name)
            elif int(match[1]) >= self.layers:
                stray.append(name)
            elif match[2].endswith(_COMPUTED):
                computed.append(name)
            elif not self.layout.holds(match[2]) and match[2] not in [f"mlp.{part}.weight" for part in PARTS]:
                stray.append(name)
        for name in stray[:_SHOWN]:
            wrong = f"tensor {name!r} has no place in {self.layout.model_type}"
            self.problems.append(Problem(self.dense.name, wrong, "choose another base or architecture"))
        if len(stray) > _SHOWN:
            self.problems.append(Problem(self.dense.name, f"{len(stray) - _SHOWN} more tensors have no place", ""))
        if computed:
            self.notes.append(f"left out, as they are computed: {len(computed)} tensors such as {computed[0]}")
        for name in _TOP[:2]:
            self._missing(self.dense, name)
        if not self.layers:
            self.problems.append(Problem(self.dense.name, "config.json has no number of layers", "get the model again"))

    def layer(self, number: int) -> None:
        """One layer: attention and norms of the base, experts, shared expert and router."""
        head = f"model.layers.{number}."
        for name in self.dense.specs:
            if name.startswith(head) and self.layout.holds(name.removeprefix(head)):
                self._copy(name, name)
        self._biases(head)
        parts = {part: self.dense.specs.get(f"{head}mlp.{part}.weight") for part in PARTS}
        for part in PARTS:
            self._missing(self.dense, f"{head}mlp.{part}.weight")
        if None in parts.values():
            return
        for i, (checkpoint, expert) in enumerate(zip(self.experts, self.recipe.experts, strict=True)):
            self._expert(head, self.layout.expert, i, 1 + i, checkpoint, expert)
        spec = next(spec for spec in parts.values() if spec is not None)
        self._shared(head, spec)
        router = head + self.layout.router
        self._make(router, TensorSpec(self._dtype(spec), (len(self.experts), spec.shape[1])))
        self.routers.append(router)

    def _expert(self, head: str, pattern: str, i: int, source: int, checkpoint: Checkpoint, expert: Expert) -> None:
        for part in PARTS:
            name = f"{head}mlp.{part}.weight"
            if self._missing(checkpoint, name):
                continue
            found, wanted = checkpoint.specs[name], self.dense.specs[name]
            if found.shape != wanted.shape or found.dtype not in STORED_FLOATS:
                wrong = f"tensor {name!r} is {found}, {self.dense.name} has {wanted}"
                self.problems.append(Problem(checkpoint.name, wrong, "give models of one architecture"))
                continue
            scale = expert.residual_scale if part == "down_proj" else None
            target = head + pattern.format(expert=i, part=self.layout.part(part))
            self._copy(target, name, source, scale)

    def _shared(self, head: str, spec: TensorSpec) -> None:
        """The expert that every token goes through: the recipe's, or where the layout must have one, one that adds nothing."""
        if self.layout.shared is None:
            return
        if self.shared is not None and self.recipe.shared is not None:
            self._expert(head, self.layout.shared, 0, self.apart - 1, self.shared, self.recipe.shared)
        elif self.layout.shared_gate is None:
            return
        else:
            rows, width = spec.shape
            rows = min(NEUTRAL_WIDTH, rows)
            for part in PARTS:
                shape = (width, rows) if part == "down_proj" else (rows, width)
                self._make(head + self.layout.shared.format(part=part), TensorSpec(self._dtype(spec), shape))
        if self.layout.shared_gate is not None:
            gate = head + self.layout.shared_gate
            self._make(gate, TensorSpec(self._dtype(spec), (1, spec.shape[1])))
            self.gates.append(gate)

    def _biases(self, head: str) -> None:
        """Biases of zero, where the layout has some and the base none."""
        for name in self.layout.biases:
            weight = self.dense.specs.get(f"{head}{name.removesuffix('bias')}weight")
            if head + name not in self.dense.specs and weight is not None:
                self._make(head + name, TensorSpec(self._dtype(weight), weight.shape[:1]))

    def _dtype(self, spec: TensorSpec) -> str:
        return (self.recipe.dtype and float_named(self.recipe.dtype)) or spec.dtype

    def _copy(self, target: str, name: str, source: int = 0, scale: float | None = None) -> None:
        dense = self.dense.specs[name]
        spec = TensorSpec(self.dense.declared.get(name, dense.dtype), dense.shape)
        if spec.dtype not in STORED_FLOATS:
            wrong = f"tensor {name!r} is {spec}"
            self.problems.append(Problem(self.dense.name, wrong, f"convert it to one of {', '.join(FLOATS)}"))
            return
        call = COPY if scale is None else _scaled(scale)
        self.outputs.append(
            Output(target, TensorSpec(self._dtype(spec), spec.shape), "merge", (Input(source, name),), None, call)
        )

    def _make(self, name: str, spec: TensorSpec) -> None:
        """A tensor that no file holds, in float32 in memory."""
        self.made[name] = TensorSpec("F32", spec.shape)
        self.outputs.append(Output(name, spec, "merge", (Input(self.apart, name),), None, COPY))

    def _missing(self, checkpoint: Checkpoint, name: str) -> bool:
        if name in checkpoint.specs:
            return False
        self.problems.append(Problem(checkpoint.name, f"has no tensor {name!r}", "give models of one architecture"))
        return True


def _scaled(scale: float) -> Call:
    return make_call(find("passthrough", "weights"), (1.0,), {"scale": scale})


def described(mixture: MixturePlan, recipe: MixtureRecipe) -> str:
    """The plan in a few lines, and every tensor."""
    layout, layers = mixture.layout, len(mixture.routers)
    drawn = ", drawn" if recipe.gate_mode in DRAWN else ""
    lines = [
        f"{layout.architecture}: {mixture.experts} experts in {layers} layers, {recipe.experts_per_token} a token",
        f"gates: {recipe.gate_mode}{drawn}, seed {recipe.seed}",
        f"base: {mixture.models[0]}",
        *(f"expert {i}: {name}" for i, name in enumerate(mixture.models[1 : 1 + mixture.experts])),
        *(f"shared expert: {name}" for name in mixture.models[1 + mixture.experts :]),
        *(f"note: {note}" for note in mixture.plan.notes),
    ]
    return "\n".join([*lines, *map(str, mixture.plan.outputs)])


def _notes(recipe: MixtureRecipe, mixture: MixturePlan) -> Iterator[str]:
    """What a user should know of the result."""
    models = mixture.models[1 : 1 + mixture.experts]
    if len(models) > 1 and len(dict.fromkeys(models)) == 1:
        yield "all experts are one model: without training, the mixture does what that model does"
    if mixture.gates and recipe.shared is None:
        yield f"{mixture.layout.model_type} has a shared expert, and the recipe gives none: it is one that adds nothing"
    elif (
        mixture.gates and recipe.shared is not None and recipe.shared.positive_prompts is None and recipe.gate_mode not in DRAWN
    ):
        yield "the shared expert's gate is zero, so half of what it gives is added; residual_scale: 2 adds all of it"
    if mixture.experts & (mixture.experts - 1):
        yield f"{mixture.experts} isn't a power of two, which some programs need"
