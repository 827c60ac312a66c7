"""`verify`: an output folder against its own record: its tensors and files, the recipe, the models that it was made from.

What differs is a finding, told by name, not an error. Hashes tell what was changed or damaged; they don't withstand someone
who forges the record too. A second run of the recipe, `again`, does.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from interfuse import __version__
from interfuse.checkpoints.adapters.pairs import CONFIG, WEIGHTS
from interfuse.checkpoints.hashes import hash_file, line_of
from interfuse.checkpoints.source import Checkpoint, hash_block, hash_blocks, hash_of, open_checkpoint
from interfuse.engine.adapters.extract import extract_lora
from interfuse.engine.adapters.merging import merge_adapters
from interfuse.engine.chain import plan_recipes
from interfuse.engine.opening import Commits, at_commit, commits_of, open_references
from interfuse.engine.output.folder import merge_into
from interfuse.errors import CheckpointError, Problem, UserError
from interfuse.pipeline.adapting import prepared_by
from interfuse.pipeline.finished import description
from interfuse.pipeline.record import DESCRIPTION, RECIPE
from interfuse.plan import Plan
from interfuse.progress import track
from interfuse.recipe import load_recipe, load_recipes
from interfuse.recipe.merges import tokenizer_models
from interfuse.recipe.pieces import references
from interfuse.recipe.references import Reference

_KINDS = ("merge", "mixture", "transplant", "adapter merge", "extracted adapter")


class Check(NamedTuple):
    """One thing that was looked at: what kind, its name, whether it is as it should be (None: can't be told), and why."""

    what: str
    name: str
    good: bool | None
    said: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `good`: nothing differs."""

    folder: Path
    kind: str
    checks: tuple[Check, ...]

    @property
    def good(self) -> bool:
        """Whether nothing differs; what can't be told isn't held against it."""
        return all(check.good is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON."""
        return {**asdict(self), "folder": str(self.folder), "good": self.good, "checks": [c._asdict() for c in self.checks]}

    def text(self) -> str:
        """A line for each kind of thing, with those that aren't as they should be, and one for all."""
        lines = []
        for what in dict.fromkeys(check.what for check in self.checks):
            checks = [check for check in self.checks if check.what == what]
            fine = sum(check.good is True for check in checks)
            lines.append(f"{what:<8} {fine} of {len(checks)} the same")
            lines += [f"  {check.name}: {check.said}".replace("  : ", "  ") for check in checks if check.good is not True]
        wrong = sum(check.good is False for check in self.checks)
        untold = sum(check.good is None for check in self.checks)
        end = f"{wrong} {'thing differs' if wrong == 1 else 'things differ'}" if wrong else "all is well"
        return "\n".join([*lines, f"{self.folder}: {end}{f', {untold} not to be told' if untold else ''}"])


class _Made(NamedTuple):
    """What is found of how a folder was made, and what makes it again in another (None: that can't be)."""

    checks: list[Check]
    again: Callable[[Path], Any] | None


def verify(
    out: str | Path, *, again: bool = False, threads: int | None = None, device: str | None = None, progress: bool = True
) -> Verification:
    """Check the folder of a merge, a mixture, a transplant or an adapter against its `interfuse.json`.

    Its tensors (names, types, shapes, hashes) and other files; the recipe, by planning it once more; and the models that it
    was made from, where they are still to be found: of those on a hub the very commits that were read. With `again` it's made
    once more, in a folder beside that is removed afterwards, and compared bit for bit. `threads` and `device` are that run's.
    A folder without such a record is a `CheckpointError`.
    """
    folder = Path(out)
    record = _record(folder)
    there, checks = _tensors(folder, record, progress)
    checks += _files(folder, record)
    made = _MAKERS[record["kind"]](folder, record, threads, device, progress)
    checks += made.checks
    if again:
        checks += _again(folder, record, there, made.again)
    return Verification(folder, record["kind"], tuple(checks))


def _record(folder: Path) -> dict[str, Any]:
    """The folder's record, once it's sure that it has what is needed here."""
    if not folder.is_dir():
        raise CheckpointError(Problem(str(folder), "no such folder", "give a folder that interfuse wrote"))
    record = description(folder)
    if not record:
        raise CheckpointError(Problem(str(folder), f"has no {DESCRIPTION}", "give a folder that interfuse wrote"))
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in _KINDS:
        raise CheckpointError(Problem(str(folder), f"holds a {kind}", f"what can be verified: {', '.join(_KINDS)}"))
    wanted = {"tensors": dict, "files": dict, "sources": list}
    missing = [key for key, form in wanted.items() if not isinstance(record.get(key), form)]
    if missing:
        problems = [Problem(str(folder / DESCRIPTION), f"has no {key}", "make the folder again") for key in missing]
        raise CheckpointError(*problems)
    return record


def _weights(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder)


def _tensors(folder: Path, record: Mapping[str, Any], progress: bool) -> tuple[dict[str, str], list[Check]]:
    """What each tensor is now, and how that differs from what was written."""
    wanted: dict[str, str] = record["tensors"]
    try:
        there = _weights(folder)
    except UserError as error:
        return {}, [Check("tensors", "", False, f"can't be read: {problem}") for problem in error.problems]
    found: dict[str, str] = {}
    checks = []
    for name, line in track(wanted.items(), "reading", len(wanted), shown=progress):
        if name not in there.specs:
            checks.append(Check("tensors", name, False, "is missing"))
            continue
        spec = str(there.specs[name])
        found[name] = line_of(there, name)
        if spec != line.rpartition(" ")[0]:
            checks.append(Check("tensors", name, False, f"is {spec}, and was written as {line.rpartition(' ')[0]}"))
        else:
            good = found[name] == line
            checks.append(Check("tensors", name, good, "" if good else "its values aren't those that were written"))
    checks += [Check("tensors", name, False, "wasn't written") for name in there.specs if name not in wanted]
    return found, checks


def _files(folder: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    for name, wanted in record["files"].items():
        path = folder / name
        if not path.is_file():
            yield Check("files", name, False, "is missing")
        else:
            good = hash_file(path) == wanted
            yield Check("files", name, good, "" if good else "isn't as it was written")


def _merge(folder: Path, record: Mapping[str, Any], threads: int | None, device: str | None, progress: bool) -> _Made:
    compat, nonfinite = record.get("mergekit_compat", False), record.get("allow_nonfinite", False)
    try:
        recipes = load_recipes(record["recipes"])
    except (UserError, KeyError, TypeError) as error:
        return _Made([Check("recipe", DESCRIPTION, False, f"isn't a recipe: {error}")], None)
    checks = _recipe_file(folder, load_recipes, recipes)
    names = [recipe.name for recipe in recipes]
    refs = dict.fromkeys(ref for recipe in recipes for ref in references(recipe) if ref.path not in names)
    words = [Reference.parse(model) for recipe in recipes for _, model in tokenizer_models(recipe)]
    commits = commits_of([*record["sources"], {"origins": record.get("tokenizer_origins", ())}], [*refs, *words])
    absent = _absent(list(refs), commits)
    if absent:
        reworded = any(recipe.tokenizer_source is not None or recipe.tokenizer is not None for recipe in recipes)
        there = [] if reworded else _alone(record, {check.name for check in absent}, commits)
        return _Made([*checks, *absent, *there], None)
    try:
        stages = plan_recipes(recipes, compat=compat, scratch=folder.resolve().parent, commits=commits)
    except UserError as error:
        return _Made([*checks, *(Check("recipe", DESCRIPTION, False, str(problem)) for problem in error.problems)], None)
    plan, sources = stages[-1].plan, stages[-1].sources
    earlier = {stage.name: [source.name for source in stage.sources] for stage in stages[:-1]}
    checks += _planned(record, plan, sources, earlier)

    def again(target: Path) -> None:
        merge_into(
            plan, sources, target, recipes=record["recipes"], compat=compat,
            threads=threads, allow_nonfinite=nonfinite, progress=progress,
        )  # fmt: skip

    return _Made(checks, again)


def _mixture(folder: Path, record: Mapping[str, Any], threads: int | None, device: str | None, progress: bool) -> _Made:
    from interfuse.mixture.making import make_into, opened, references_of
    from interfuse.mixture.recipe import load_mixture

    try:
        recipe = load_mixture(record["recipes"][0])
    except (UserError, LookupError, TypeError) as error:
        return _Made([Check("recipe", DESCRIPTION, False, f"isn't a recipe: {error}")], None)
    checks = _recipe_file(folder, load_mixture, recipe)
    refs = list(dict.fromkeys(references_of(recipe)))
    commits = commits_of(record["sources"], refs)
    absent = _absent(refs, commits)
    if absent:
        return _Made([*checks, *absent], None)
    try:
        mixture, sources = opened(recipe, commits)
    except UserError as error:
        return _Made([*checks, *(Check("recipe", DESCRIPTION, False, str(problem)) for problem in error.problems)], None)
    checks += _planned(record, mixture.plan, sources, {})
    return _Made(
        checks,
        lambda target: make_into(recipe, mixture, sources, target, threads=threads, device=device, progress=progress),
    )


def _adapters(folder: Path, record: Mapping[str, Any], threads: int | None, device: str | None, progress: bool) -> _Made:
    checks, there = _whole(record, lambda path: open_checkpoint(_adapter_file(path)))
    checks = [_configured(source, check) for source, check in zip(record["sources"], checks, strict=True)]
    wanted = (record["method"], record["options"], record["weights"])
    if there:
        checks = [*_recipe_file(folder, _asked, wanted), *checks]

    def again(target: Path) -> None:
        paths = [source["model"] for source in record["sources"]]
        merge_adapters(
            record["method"], paths, target,
            weights=record["weights"], dtype=record["dtype"], overwrite=True, **record["options"],
        )  # fmt: skip

    return _Made(checks, again if there else None)


def _configured(source: Mapping[str, Any], check: Check) -> Check:
    """The check of an adapter's tensors, and whether its settings are what they were: they say how much the tensors count."""
    path = Path(source["model"]) / CONFIG
    if check.good and "config" in source and not (path.is_file() and hash_file(path) == source["config"]):
        return check._replace(good=False, said=f"{CONFIG} isn't as it was when it was read")
    return check


def _asked(path: Path) -> tuple[str, dict[str, Any], list[float]]:
    """What a recipe of adapters asks for, as the record has it."""
    prepared = prepared_by(load_recipe(path))
    options = json.loads(json.dumps({name.rstrip("_"): value for name, value in prepared.options.items()}))
    return prepared.method.name, options, list(prepared.weights)


def _adapter_file(path: str) -> Path:
    return next((Path(path) / name for name in (WEIGHTS, "adapter_model.bin") if (Path(path) / name).is_file()), Path(path))


def _extracted(folder: Path, record: Mapping[str, Any], threads: int | None, device: str | None, progress: bool) -> _Made:
    refs = {source["model"]: Reference.parse(source["model"]) for source in record["sources"]}
    commits = commits_of(record["sources"], list(refs.values()))
    checks, there = _whole(record, lambda path: open_references([refs[path]], commits=commits)[refs[path]])

    def again(target: Path) -> None:
        model, base = (str(at_commit(refs[source["model"]], commits)) for source in record["sources"])
        extract_lora(model, base, target, overwrite=True, **record["options"])

    return _Made(checks, again if there else None)


def _transplant(folder: Path, record: Mapping[str, Any], threads: int | None, device: str | None, progress: bool) -> _Made:
    from interfuse.pipeline.transplanting import digest_of, prepared_by, write_into

    try:
        recipe = load_recipe(record["recipes"][0])
    except (UserError, LookupError, TypeError) as error:
        return _Made([Check("recipe", DESCRIPTION, False, f"isn't a recipe: {error}")], None)
    checks = _recipe_file(folder, load_recipe, recipe)
    inputs, there = _whole(record, open_checkpoint)
    if not there:
        return _Made([*checks, *inputs], None)
    try:
        prepared = prepared_by(recipe)
    except UserError as error:
        wrong = [Check("recipe", DESCRIPTION, False, str(problem)) for problem in error.problems]
        return _Made([*checks, *wrong, *inputs], None)
    same = digest_of(prepared) == record.get("plan")
    said = "" if same else "gives another plan: the recipe or a model's tensors have changed"
    checks = [*checks, Check("recipe", DESCRIPTION, same, said), *inputs]
    return _Made(checks, lambda target: write_into(recipe, prepared, target))


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None, str | None, bool], _Made]] = {
    "merge": _merge,
    "mixture": _mixture,
    "transplant": _transplant,
    "adapter merge": _adapters,
    "extracted adapter": _extracted,
}


def _recipe_file(folder: Path, load: Callable[[Path], Any], wanted: Any) -> list[Check]:
    """Whether the recipe that lies beside the record, where one does, is the recorded one."""
    if not (folder / RECIPE).is_file():
        return []
    try:
        same = load(folder / RECIPE) == wanted
    except UserError as error:
        return [Check("recipe", RECIPE, False, str(problem)) for problem in error.problems]
    return [Check("recipe", RECIPE, same, "" if same else f"isn't the one in {DESCRIPTION}")]


def _absent(refs: Sequence[Reference], commits: Commits) -> list[Check]:
    """The models that can't be opened."""
    checks = []
    for ref in refs:
        try:
            open_references([ref], commits=commits)
        except UserError as error:
            checks.append(Check("inputs", str(ref), None, f"can't be found: {error.problems[0].wrong}"))
    return checks


def _alone(record: Mapping[str, Any], absent: set[str], commits: Commits) -> Iterator[Check]:
    """The models that are here while others aren't, so that there's no plan."""
    for source in record["sources"]:
        name = source["model"]
        if name in absent:
            continue
        try:
            (there,) = open_references([Reference.parse(name)], commits=commits).values()
            yield _input(source, there)
        except UserError:
            yield Check("inputs", name, None, "can't be told while other models aren't here")


def _whole(record: Mapping[str, Any], opening: Callable[[str], Checkpoint]) -> tuple[list[Check], bool]:
    """Inputs that were read whole, and whether all are here."""
    checks = []
    for source in record["sources"]:
        try:
            checks.append(_input(source, opening(source["model"])))
        except UserError as error:
            checks.append(Check("inputs", source["model"], None, f"can't be found: {error.problems[0].wrong}"))
    return checks, all(check.good is not None for check in checks)


def _planned(
    record: Mapping[str, Any], plan: Plan, sources: Sequence[Checkpoint], earlier: Mapping[str | None, Sequence[str]]
) -> Iterator[Check]:
    """Whether the recipe gives the plan that was run, and whether the inputs are those that were read."""
    same = plan.digest() == record.get("plan")
    version = record.get("versions", {}).get("interfuse")
    why = f"gives another plan now, with {__version__}; made with {version}" if version != __version__ else "gives another plan"
    yield Check("recipe", DESCRIPTION, same, "" if same else f"{why}: the recipe or a model's tensors have changed")
    for known, source in zip(record["sources"], sources, strict=False):
        check = _input(known, source)
        made = f"made of {' and '.join(earlier[source.name])}, " if source.name in earlier and check.said else ""
        yield check._replace(said=made + check.said)


def _input(known: Mapping[str, Any], source: Checkpoint) -> Check:
    """Whether a model's tensors, those that were read, are what they were."""
    names = [name for name in source.specs if name not in known.get("unread", ())]
    tensors = {name: (source.specs[name], hash_blocks(map(hash_block, source.blocks(name)))) for name in names}
    good = hash_of(tensors) == known["xxh3"]
    return Check("inputs", known["model"], good, "" if good else "isn't as it was when it was read")


def _again(
    folder: Path, record: Mapping[str, Any], there: Mapping[str, str], make: Callable[[Path], Any] | None
) -> list[Check]:
    """Each tensor, made once more."""
    if make is None:
        return [Check("again", "", False, "can't be made again, as its recipe can't be run or its models aren't here")]
    resolved = folder.resolve()
    target = Path(tempfile.mkdtemp(prefix=f".{resolved.name}.verify-", dir=resolved.parent))
    try:
        make(target)
        made = _weights(target)
        checks = []
        for name in dict.fromkeys([*made.specs, *record["tensors"]]):
            good = name in made.specs and there.get(name) == line_of(made, name)
            checks.append(Check("again", name, good, "" if good else "comes out otherwise"))
        return checks
    except UserError as error:
        return [Check("again", "", False, f"can't be made again: {problem}") for problem in error.problems]
    finally:
        shutil.rmtree(target, ignore_errors=True)
