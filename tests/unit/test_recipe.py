"""Recipes: the form, every problem at once, YAML's corners, paths, and what holds between keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interfuse.errors import RecipeError
from interfuse.recipe import check_recipe, check_recipes, load_recipe, load_recipes, recipe_schema
from interfuse.recipe.check import experts_of, names_of, options_of, weights_of

FUSION: dict[str, Any] = {
    "fusion": "attention",
    "models": [{"model": "org/a", "tap": "features.7"}, "org/b"],
    "parameters": {"dim": 64, "heads": 4},
    "head": {"classes": 10},
    "data": {"train": "train.npz", "validation": 0.1, "test": "test.npz"},
    "training": {"epochs": 5, "learning_rate": 1e-3},
    "evaluate": {"metric": "accuracy"},
}
MERGE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [
        {"model": "org/a", "parameters": {"weight": 0.3}},
        {"model": "org/b", "parameters": {"weight": 0.7}},
    ],
    "parameters": {"normalize": False, "int8_mask": True},
    "dtype": "float32",
}


def problems(recipe: dict[str, Any], *, run: bool = False, trust_code: bool = False) -> dict[str, str]:
    """What is wrong, by path; empty where nothing is."""
    try:
        check_recipe(recipe, trust_code=trust_code) if run else load_recipe(recipe)
    except RecipeError as error:
        return {p.path: f"{p.wrong}; {p.allowed}" for p in error.problems}
    return {}


def changed(recipe: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {k: v for k, v in {**recipe, **keys}.items() if v is not None}


def test_good_recipes_have_no_problems() -> None:
    assert problems(FUSION) == {}
    assert problems(MERGE) == {}
    assert problems({"models": ["org/a"], "data": {"train": "t.npz"}}) == {}
    assert problems({"fusion": "ensemble", "models": ["org/a", "org/b"], "parameters": {"combine": "logits"}}) == {}


def test_every_problem_is_listed_at_once_with_its_path_and_value() -> None:
    found = problems(
        {
            "fusion": "atention",
            "models": [{"model": "org/a", "tapp": "x"}, {"model": "org/b", "freeze": "maybe"}],
            "data": {"train": "t.npz", "validation": 1.5},
            "training": {"epochs": -1, "patience": 3},
            "evaluate": {"metric": "accuracy"},
            "sead": 3,
        }
    )
    assert list(found) == [
        "models[0].tapp",
        "models[1].freeze",
        "data.validation",
        "training.epochs",
        "sead",
        "fusion",
        "training.patience",
        "evaluate",
    ]
    assert "did you mean 'tap'?" in found["models[0].tapp"]
    assert "'maybe'" in found["models[1].freeze"]
    assert "got 1.5; should be a share between 0 and 1" in found["data.validation"]
    assert "got -1; at least 0" in found["training.epochs"]
    assert "did you mean 'seed', 'head' or 'heads'?" in found["sead"]
    assert "did you mean 'attention'?" in found["fusion"]


MERGEKIT: list[dict[str, Any]] = [
    {
        "merge_method": "slerp",
        "slices": [
            {"sources": [{"model": "org/a", "layer_range": [0, 32]}, {"model": "org/b", "layer_range": [0, 32]}]},
        ],
        "base_model": "org/a",
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        "dtype": "float16",
    },
    {
        "merge_method": "task_arithmetic",
        "models": [
            {"model": "org/base"},
            {"model": "org/a@main", "parameters": {"weight": [0, 0.3, 0.7, 1]}},
            {"model": "org/b+org/lora", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]}},
            {"model": {"model": {"path": "org/c", "revision": "v1"}, "lora": {"path": "org/l"}}, "parameters": {"weight": 1}},
        ],
        "base_model": "org/base",
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
        "out_dtype": "bfloat16",
        "chat_template": "auto",
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_start|>": {"source": "org/a"},
                "<|x|>": {"source": {"kind": "model_token", "model": "org/a", "token_id": 4}, "force": True},
                "<|y|>": {"source": {"kind": "zero"}},
            },
            "pad_to_multiple_of": 64,
        },
    },
    {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"slices": [{"sources": [{"model": "org/a", "layer_range": [0, 2], "parameters": {"weight": 1}}]}]},
            "vision_tower": {"models": ["org/a", "org/b"], "parameters": {"weight": [0, 1]}},
        },
        "tokenizer_source": "org/b",
        "drop": ["position_ids"],
        "keep": ["*.inv_freq", "/head$/"],
    },
]


@pytest.mark.parametrize("recipe", MERGEKIT)
def test_mergekits_recipes_are_read(recipe: dict[str, Any]) -> None:
    assert problems(recipe, run=True) == {}


def test_references_are_texts_with_absolute_paths_at_every_level(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "c").mkdir()
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: linear\nbase_model: ./c@v1\nslices:\n- base_model: org/x\n  sources:\n"
        "  - {model: a+b, layer_range: [0, 1]}\n  - {model: {path: a+b}, layer_range: [1, 2]}\n"
        "  - {model: org/x+c, layer_range: [1, 2]}\n"
        "tokenizer: {source: c, tokens: {t: {source: {kind: zero}}, u: {source: c}}}\n"
    )
    recipe = load_recipe(path)
    c = str(tmp_path / "c")
    assert recipe.base_model == f"{c}@v1"
    assert recipe.slices is not None
    assert [s.model for s in recipe.slices[0].sources] == [str(tmp_path / "a+b"), str(tmp_path / "a+b"), f"org/x+{c}"]
    assert recipe.slices[0].base_model == "org/x"
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens is not None
    assert recipe.tokenizer.source == c
    assert [row.source for row in recipe.tokenizer.tokens.values()] == [{"kind": "zero"}, c]
    assert list(problems_of_file(path)) == ["base_model"]


def problems_of_file(path: Path) -> dict[str, str]:
    try:
        check_recipes(path)
    except RecipeError as error:
        return {p.path: f"{p.wrong}; {p.allowed}" for p in error.problems}
    return {}


FIRST = "name: first\nmerge_method: linear\nmodels: [org/a, org/b]\n"


def test_recipes_of_one_file_use_each_others_results(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()  # a recipe's name goes before a folder's
    path = tmp_path / "r.yaml"
    path.write_text(f"{FIRST}---\nmerge_method: linear\nmodels: [first, org/c, first+org/lora]\n---\n")
    first, last = load_recipes(path)
    assert first.name == "first"
    assert [entry.model for entry in last.models] == ["first", "org/c", "first+org/lora"]
    assert problems_of_file(path) == {}
    with pytest.raises(RecipeError, match="holds 2 recipes, of which later ones use earlier ones"):
        load_recipe(path)
    assert load_recipes([MERGE]) == (load_recipe(MERGE),)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        (f"{FIRST}---\nmerge_method: linear\nmodels: [org/a]\n", "documents[0].name", "no later recipe uses 'first'"),
        (f"{FIRST}---\nname: first\nmerge_method: linear\nmodels: [first]\n", "documents[1].name", "is also documents[0]'s"),
        ("merge_method: linear\nmodels: [org/a]\n---\nmerge_method: linear\nmodels: [b]\n", "documents[0].name", "missing"),
        (f"{FIRST}---\nmodels: [first]\ndata: {{train: t.npz}}\n", "documents[1].merge_method", "is a merge"),
        (
            f"{FIRST.replace('org/b', 'second')}---\nname: second\nmerge_method: linear\nmodels: [first]\n",
            "documents[0].models[1].model",
            "'second' comes later in the file",
        ),
        (FIRST.replace("org/b", "first") + f"---\n{FIRST}", "documents[0].models[1].model", "'first' is this recipe itself"),
        (f"{FIRST}---\nmerge_method: linear\nmodels: [first]\nsead: 3\n", "documents[1].sead", "did you mean 'seed'"),
    ],
)
def test_what_a_file_of_several_recipes_refuses(tmp_path: Path, text: str, path: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    found = problems_of_file(tmp_path / "r.yaml")
    assert path in found
    assert said in found[path]


def test_a_tap_may_be_a_number() -> None:
    recipe = load_recipe(changed(FUSION, models=[{"model": "org/a", "tap": 6}, "org/b"]))
    assert recipe.models[0].tap == "6"


def test_options_are_not_coerced() -> None:
    merge = {"merge_method": "linear", "models": ["org/a"], "parameters": {"normalize": "yes"}}
    assert problems(merge) == {"parameters.normalize": "got 'yes'; true or false"}
    fusion = changed(FUSION, parameters={"heads": "2", "dropout": "0.1"})
    assert list(problems(fusion)) == ["parameters.heads", "parameters.dropout"]


def test_a_model_that_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "fusion: attention\nmodels: [5, {mdl: x}, ./none, {model: {pth: x}}]\nparameters: {headz: 2}\nhead: {classes: 0}\n"
        "data: {train: none.npz, tset: x}\nmerge: linear\n"
    )
    with pytest.raises(RecipeError) as caught:
        check_recipe(path)
    assert [p.path for p in caught.value.problems] == [
        "models[0]", "models[1].model", "models[1].mdl", "models[3].model", "head.classes", "data.tset", "merge",
        "parameters.headz", "data.train", "models[2].model",
    ]  # fmt: skip
    assert "models[0]: got 5; a mapping" in str(caught.value)
    assert "merge: unknown key; did you mean 'merge_method'?" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "path", "said"),
    [
        ({"merge_method": "linear"}, "merge_method", "keep one of the two"),
        ({"fusion": None}, "models", "2 models and no word on how to fuse them"),
        ({"models": []}, "models", "none given; at least 1"),
        ({"models": [{"model": "a", "name": "x"}, {"model": "b", "name": "x"}]}, "models[1].name", "'x' is also models"),
        ({"models": [{"model": "a", "name": "x.y"}, "b"]}, "models[0].name", "got 'x.y'"),
        ({"models": [{"model": "a", "parameters": {"weight": 1}}, "b"]}, "models[0].parameters", "only in a merge"),
        ({"models": [{"tap": "x"}, "b"]}, "models[0].model", "missing"),
        ({"models": [{"model": {"pth": "a"}}, "b"]}, "models[0].model", "pth: unknown key"),
        ({"parameters": {"headz": 4}}, "parameters.headz", "did you mean 'heads'?"),
        ({"parameters": {"heads": 0}}, "parameters.heads", "got 0"),
        ({"parameters": {"dim": 2.5}}, "parameters.dim", "got 2.5; a whole number"),
        ({"parameters": {"pool": "max"}}, "parameters.pool", "got 'max'"),
        ({"head": True}, "head.classes", "got True; should be a whole number from 1"),
        ({"head": {"classes": ["a", "a"]}}, "head.classes", "a list of different names"),
        ({"base_model": "org/c"}, "base_model", "only in a merge"),
        ({"out_dtype": "float16"}, "out_dtype", "only in a merge"),
        ({"slices": []}, "slices", "only in a merge"),
        ({"tokenizer_source": "union"}, "tokenizer_source", "only in a merge"),
        ({"data": None, "evaluate": None}, "data.train", "missing; a fusion of features is trained"),
        ({"data": {"train": "t.npz"}}, "evaluate", "there is no test data"),
        ({"data": {"validation": "v.npz", "test": "t.npz"}}, "data.validation", "stands without data.train"),
        ({"data": {"train": "t.npz", "test": "t.npz", "input": {"a": "x", "c": "y"}}}, "data.input", "['c', 'b']"),
        ({"data": {"train": "t.npz", "test": "t.npz", "input": 3}}, "data.input", "got 3; should be a name"),
        ({"data": {"train": "t.npz", "test": "t.npz", "std": [0.0]}}, "data.std[0]", "got 0.0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate", "got nan"),
        ({"training": {"epochs": "5"}}, "training.epochs", "got '5'"),
        ({"training": {"epochs": True}}, "training.epochs", "got True"),
    ],
)
def test_what_a_fusion_refuses(keys: dict[str, Any], path: str, said: str) -> None:
    found = problems(changed(FUSION, **keys))
    assert path in found
    assert said in found[path]


@pytest.mark.parametrize(
    ("keys", "path", "said"),
    [
        ({"merge_method": "tiess"}, "merge_method", "no weights method is named 'tiess'"),
        ({"merge_method": "task_arithmetic", "parameters": None}, "base_model", "missing"),
        ({"parameters": {"normalise": True}}, "parameters.normalise", "did you mean 'normalize'?"),
        ({"parameters": {"normalize": [0, 1]}}, "parameters.normalize[0]", "got 0; true or false"),
        ({"parameters": {"normalize": {"filter": "mlp"}}}, "parameters.normalize.value", "missing"),
        ({"parameters": {"normalize": [{"value": True}, {"value": 3}]}}, "parameters.normalize[1]", "never reached"),
        (
            {"models": [{"model": "a", "parameters": {"weight": [0, float("nan")]}}]},
            "models[0].parameters.weight[1]",
            "got nan",
        ),
        ({"models": [{"model": "a", "parameters": {"weight": "x"}}]}, "models[0].parameters.weight", "got 'x'"),
        (
            {"models": [{"model": "a", "parameters": {"density": 1}}]},
            "models[0].parameters.density",
            "linear has no such option",
        ),
        (
            {"models": ["a", {"model": "b", "parameters": {"normalize": True}}]},
            "models[1].parameters.normalize",
            "linear has one normalize for all models; write it under the recipe's `parameters`",
        ),
        ({"merge_method": "karcher", "parameters": {"max_iter": [1, 5]}}, "parameters.max_iter[0]", "takes whole numbers"),
        ({"merge_method": "slerp", "base_model": "a", "parameters": None}, "parameters.t", "missing"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "slices", "stands beside models"),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]},
            "slices[0].sources[0].layer_range",
            "got [0]; should be two whole numbers",
        ),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"weigth": 1}}]}]},
            "slices[0].sources[0].parameters.weigth",
            "did you mean 'weight'?",
        ),
        ({"models": None, "slices": [{"sources": [], "x": 1}]}, "slices[0].x", "unknown key"),
        ({"models": None, "modules": {"x": {}}}, "modules.x", "has neither slices nor models"),
        ({"models": None, "modules": {"x": {"modles": ["a"]}}}, "modules.x.modles", "did you mean 'models'"),
        (
            {"models": None, "modules": {"x": {"models": [{"model": "a", "parameters": {"y": 1}}]}}},
            "modules.x.models[0].parameters.y",
            "linear has no such option",
        ),
        ({"drop": ["/(/"]}, "drop[0]", "got '/(/'"),
        ({"tokenizer_source": "union", "tokenizer": {}}, "tokenizer_source", "stands beside tokenizer"),
        ({"tokenizer": {"source": "a+b+c"}}, "tokenizer.source", "got 'a+b+c' with 2 '+'"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "nil"}}}}}, "tokenizer.tokens.<a>.source.kind", "got 'nil'"),
        (
            {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "model": "m"}}}}},
            "tokenizer.tokens.<a>.source.token_id",
            "missing, and so is token",
        ),
        ({"models": ["a+b+c"]}, "models[0].model", "with 2 '+'"),
        ({"models": [*MERGE["models"], "c"]}, "models[2].parameters.weight", "missing while other models have one"),
        ({"models": [{"model": "a", "tap": "x"}]}, "models[0].tap", "only a fusion of features"),
        ({"models": [{"model": "a", "freeze": True}]}, "models[0].freeze", "nothing is trained here"),
        ({"training": {"epochs": 1}}, "training", "a merge isn't trained"),
        ({"data": {"train": "t.npz"}}, "data.train", "nothing is trained here"),
        ({"head": 3}, "head", "only a fusion of features gets a head"),
        ({"models": None}, "models", "none given"),
    ],
)
def test_what_a_merge_refuses(keys: dict[str, Any], path: str, said: str) -> None:
    found = problems(changed(MERGE, **keys))
    assert path in found
    assert said in found[path]


@pytest.mark.parametrize(
    ("recipe", "path", "said"),
    [
        ({"models": ["a"]}, "data", "neither train nor test"),
        ({"models": ["a"], "data": {"test": "t.npz"}, "training": {"epochs": 1}}, "data.train", "missing while training"),
        ({"models": ["a"], "data": {"train": "t"}, "parameters": {"dim": 3}}, "parameters", "no method to set"),
        ({"fusion": "ensemble", "models": ["a", "b"], "training": {"epochs": 1}}, "training", "an ensemble isn't trained"),
        ({"fusion": "ensemble", "models": ["a", "b"], "parameters": {"combine": "x"}}, "parameters.combine", "got 'x'"),
        (
            {"fusion": "ensemble", "models": ["a"], "parameters": {"combine": "vote"}, "data": {"train": "t"}},
            "data.train",
            "noth",
        ),
        ({"fusion": "ensemble", "models": ["a"], "parameters": {"combine": "greedy"}}, "data.validation", "greedy is learned"),
        (
            {"fusion": "ensemble", "models": ["a"], "data": {"validation": 0.1}},
            "data.validation",
            "got 0.1; a source of its own",
        ),
        (
            {"fusion": "ensemble", "models": ["a"], "data": {"validation": "t", "test": "t"}},
            "data.validation",
            "is data.test too",
        ),
        ({}, "models", "0 models"),
        ({"fusion": "mean", "models": ["a", "b"], "training": {"epochs": 0}}, "data.train", "a fusion of features is trained"),
    ],
)
def test_what_the_other_forms_refuse(recipe: dict[str, Any], path: str, said: str) -> None:
    found = problems(recipe)
    assert path in found
    assert said in found[path]


def test_missing_files_and_untrusted_code_are_listed_together(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"")
    recipe = {
        "fusion": "mean",
        "models": [
            {"model": "python:nets:a", "weights": str(tmp_path / "none.safetensors")},
            str(tmp_path / "gone"),
            str(tmp_path / "w.pt"),
            "python:nets",
        ],
        "data": {"train": "no.npz", "validation": "python:d:v", "test": "org/dataset:test"},
        "nonsense": 1,
    }
    found = problems(recipe, run=True)
    assert list(found) == [
        "nonsense",
        "data.train",
        "data.validation",
        "models[0].model",
        "models[1].model",
        "models[2].model",
        "models[3].model",
        "models[0].weights",
    ]
    assert "--trust-code" in found["models[0].model"]
    assert "python:d:v runs code" in found["data.validation"]
    assert "file of weights without its network" in found["models[2].model"]
    assert "python:package.module:function" in found["models[3].model"]
    trusted = problems(recipe, run=True, trust_code=True)
    assert "models[0].model" not in trusted
    assert "data.validation" not in trusted


def test_yaml_numbers_and_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "models: [org/a]\ndata: {train: t.npz}\ntraining: &t {learning_rate: 1e-5, weight_decay: 1.5e2}\nevaluate: null\n"
    )
    recipe = load_recipe(path)
    assert recipe.training is not None
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-5, 150.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fusion: mean\nmodels: [a, b\n", r"line 3, column 1: "),
        ("fusion: mean\nseed: 1\nfusion: gate\n", r"line 3, column 1: the key 'fusion' is written twice \(first in line 1\)"),
        ("data: {train: a, train: b}\n", r"line 1, column 18: the key 'train' is written twice"),
        ("x: !!python/object/apply:os.system [ls]\n", r"line 1, column 4: could not determine a constructor"),
        ("- a\n", "holds a list; a recipe is a mapping"),
        ("", "holds nothing; a recipe is a mapping"),
        ("[" * 5000, "not YAML|line 1"),
        ("a: \x00", "not YAML"),
    ],
)
def test_yaml_errors_say_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_recipe_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: the recipe can't be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_paths_are_read_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "cnn").mkdir()
    (tmp_path / "sub" / "train.npz").write_bytes(b"")
    (tmp_path / "here").mkdir()
    recipe = tmp_path / "sub" / "r.yaml"
    recipe.write_text(
        "fusion: mean\nmodels: [cnn, {model: 'python:n:f', weights: w.safetensors}, org/x, here]\n"
        "data: {train: train.npz, validation: ./v.npz, test: 'org/d:test'}\n"
    )
    monkeypatch.chdir(tmp_path)
    read = load_recipe(Path("sub/r.yaml"))
    sub = tmp_path / "sub"
    assert [m.model for m in read.models] == [str(sub / "cnn"), "python:n:f", "org/x", "here"]
    assert read.models[1].weights == str(sub / "w.safetensors")
    assert read.data is not None
    assert (read.data.train, read.data.validation, read.data.test) == (
        str(sub / "train.npz"),
        str(sub / "v.npz"),
        "org/d:test",
    )


def test_a_recipe_is_frozen_and_the_mapping_it_came_from_unchanged() -> None:
    raw = json.loads(json.dumps(FUSION)) | {"oops": {"deep": 1}}
    before = json.dumps(raw)
    assert "oops" in problems(raw)
    assert json.dumps(raw) == before
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(FUSION).seed = 3


def test_names_are_read_off_references_and_numbered() -> None:
    models = ["org/net", "/x/net/", {"model": "python:m:net"}, {"model": "a", "name": "net_2"}, "b/w.v1.safetensors"]
    recipe = load_recipe({"fusion": "mean", "models": models, "data": {"train": "t.npz"}})
    assert names_of(recipe) == ["net", "net_3", "net_4", "net_2", "w_v1"]


def test_a_merges_weights_and_its_base_among_the_models() -> None:
    assert weights_of(load_recipe(MERGE)) == [0.3, 0.7]
    assert options_of(load_recipe(MERGE)) == {"normalize": False}
    arithmetic = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": ["org/base", {"model": "org/a", "parameters": {"weight": 0.5}}],
    }
    recipe = load_recipe(arithmetic)
    assert [entry.model for entry in experts_of(recipe)] == ["org/a"]
    assert weights_of(recipe) == [0.5]
    assert weights_of(load_recipe(changed(MERGE, models=["a", "b"]))) is None
    assert weights_of(load_recipe(changed(MERGE, models=["a", "b"], parameters={"weight": 2}))) == [2.0, 2.0]


def test_the_schema_names_the_methods_describes_every_key_and_takes_short_forms() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert {"attention", "ensemble"} <= set(schema["properties"]["fusion"]["examples"])
    assert "task_arithmetic" in schema["properties"]["merge_method"]["examples"]
    for section in [schema, *schema["$defs"].values()]:
        for kind in section.get("anyOf", [section]):
            assert all("description" in field or "$ref" in field for field in kind.get("properties", {}).values())
    assert {"type": "string"} in schema["$defs"]["ModelEntry"]["anyOf"]
    rules = {rule["if"]["required"][0]: rule for rule in schema["allOf"]}
    assert set(rules) == {"fusion", "merge_method"}
    attention = next(r for r in schema["allOf"] if r["if"]["properties"].get("fusion") == {"const": "attention"})
    assert {"heads", "dim", "pool", "residual"} <= set(attention["then"]["properties"]["parameters"]["properties"])


@pytest.mark.parametrize("key", ["merge_metod", "merge-method", "method"])
def test_a_misspelt_method_key_does_not_make_all_else_look_wrong(key: str) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
    with pytest.raises(RecipeError) as caught:
        load_recipe({key: "ties", "base_model": "base", "models": models, "parameters": {"densty": 0.5}, "dtype": "float16"})
    said = {problem.path: problem.allowed for problem in caught.value.problems}
    assert said.pop(key) == "did you mean 'merge_method'?"
    assert list(said) == ["parameters.densty", "models[1].parameters.weight"]
