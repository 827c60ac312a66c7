"""LoRA: what peft writes is read as peft reads it, applied block by block, merged in factors, extracted, and refused aloud."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import nn

from interfuse.checkpoints.adapters.lora import open_adapter, with_adapter
from interfuse.checkpoints.adapters.lowrank import add_product
from interfuse.checkpoints.names import align
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.engine.adapters.extract import extract_lora
from interfuse.engine.adapters.merging import merge_adapters
from interfuse.errors import CheckpointError, OptionError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """peft's and transformers' own warnings aren't what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes, **tokens)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 32}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=40, num_hidden_layers=2, **sizes)
    ).eval()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 4, 1), "n": nn.BatchNorm2d(4), "c": nn.Linear(4, 2)}
    return nn.Sequential(nn.ModuleDict(layers)).eval()


def adapter(make: Make, folder: Path, seed: int = 1, **config: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random adapter as peft saves it, and the weights that peft merges it into."""
    safe = config.pop("safe_serialization", True)
    model = peft.get_peft_model(make(), peft.LoraConfig(init_lora_weights=False, **config))
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        changed = "lora_" in name or "modules_to_save" in name
        changed |= config.get("bias") == "all" and name.endswith("bias")
        changed |= "bias" in config and name.endswith("base_layer.bias")
        if changed:
            value.data += torch.randn_like(value) * 0.3
    model.save_pretrained(folder, safe_serialization=safe)
    return folder, model.merge_and_unload().state_dict()


def opened(make: Make) -> Checkpoint:
    return open_checkpoint({name: value.clone() for name, value in make().state_dict().items()})


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def furthest(one: Mapping[str, np.ndarray], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - np.asarray(other[name])).max()) for name in one)


ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 4}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, ATTENTION),
        (llama, {**ATTENTION, "safe_serialization": False}),
        (
            llama,
            {
                **ATTENTION,
                "use_rslora": True,
                "rank_pattern": {"down_proj": 3},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
            },
        ),
        (llama, {**ATTENTION, "use_dora": True, "modules_to_save": ["norm", "lm_head"]}),
        (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 3}),
        (llama, {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "use_dora": True}),
        (gpt2, {**GPT2, "bias": "all"}),
        (gpt2, {**GPT2, "bias": "lora_only"}),
        (gpt2, {**GPT2, "lora_bias": True, "use_rslora": True}),
        (gpt2, {**GPT2, "use_dora": True}),
        (convolutional, {"target_modules": ["a", "b", "c"], "r": 2, "modules_to_save": ["n"]}),
        (convolutional, {"target_modules": ["a", "b", "c"], "r": 2, "use_dora": True}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value)),
)
def test_an_adapter_gives_the_weights_that_peft_merges(tmp_path: Path, make: Make, config: dict[str, Any]) -> None:
    folder, merged = adapter(make, tmp_path / "adapter", **config)
    base = opened(make)
    patched = with_adapter(base, open_adapter(folder))
    assert furthest(values(patched), merged) < 1e-5
    assert furthest(values(patched), values(base)) > 0.05
    assert list(patched.specs) == list(base.specs)


def test_any_run_of_elements_has_the_bits_of_the_whole_tensor(tmp_path: Path) -> None:
    for config in (ATTENTION, {**ATTENTION, "use_dora": True}, {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True}):
        folder, _ = adapter(llama, tmp_path / str(len(list(tmp_path.iterdir()))), **config)
        patched = with_adapter(opened(llama), open_adapter(folder))
        for name in patched.declared:
            whole = patched.read(name).reshape(-1)
            for size in (1, 7, 16, 25, 100):
                assert np.concatenate(list(patched.blocks(name, size))).tobytes() == whole.tobytes()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 2100), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from(["f4", "f8"]))
def test_a_run_of_a_product(rows: int, columns: int, rank: int, seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((rows, rank)).astype(kind), random.standard_normal((rank, columns)).astype(kind)
    whole = np.zeros(rows * columns, kind)
    add_product(whole, 0, left, right)
    np.testing.assert_allclose(whole.reshape(rows, columns), left.astype("f8") @ right, rtol=1e-4, atol=1e-5)
    first = int(random.integers(0, columns))
    part = np.zeros(int(random.integers(0, rows * columns - first + 1)), kind)
    add_product(part, first, left, right)
    assert part.tobytes() == whole[first : first + part.size].tobytes()


def test_threads_read_the_same_bits(tmp_path: Path) -> None:
    folder, _ = adapter(llama, tmp_path / "adapter", use_dora=True, **ATTENTION)
    expected = values(with_adapter(opened(llama), open_adapter(folder)))
    patched = with_adapter(opened(llama), open_adapter(folder))
    found: list[dict[str, np.ndarray]] = []
    threads = [threading.Thread(target=lambda: found.append(values(patched))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(got[name].tobytes() == expected[name].tobytes() for got in found for name in expected)


@pytest.mark.parametrize("config", [ATTENTION, {**ATTENTION, "use_dora": True}, {**ATTENTION, "modules_to_save": ["norm"]}])
def test_scale_goes_part_of_the_way(tmp_path: Path, config: dict[str, Any]) -> None:
    folder, merged = adapter(llama, tmp_path / "adapter", **config)
    base = opened(llama)
    before = values(base)
    half = values(with_adapter(base, open_adapter(folder), 0.5))
    assert furthest(half, {name: (before[name] + np.asarray(merged[name])) / 2 for name in before}) < 1e-6
    assert furthest(values(with_adapter(base, open_adapter(folder), 0.0)), before) == 0


def test_changed_tensors_are_wide_and_say_what_they_were(tmp_path: Path) -> None:
    def half() -> nn.Module:
        return llama().to(torch.bfloat16)

    folder, _ = adapter(llama, tmp_path / "adapter", modules_to_save=["norm"], **ATTENTION)
    base = opened(half)
    patched = with_adapter(base, open_adapter(folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (patched.specs[name].dtype, patched.declared[name], base.specs[name].dtype) == ("F32", "BF16", "BF16")
    assert "model.layers.0.self_attn.k_proj.weight" not in patched.declared
    delta = values(with_adapter(opened(llama), open_adapter(folder)))[name] - llama().state_dict()[name].numpy()
    exact = half().state_dict()[name].float().numpy() + delta
    assert np.abs(patched.read(name) - exact).max() < 1e-6
    twice = with_adapter(patched, open_adapter(folder))
    assert twice.declared[name] == "BF16"
    wide = with_adapter(opened(lambda: llama().double()), open_adapter(folder))
    assert wide.specs[name].dtype == "F64"


@pytest.mark.parametrize(("taken", "added"), [("model.", ""), ("", "module.")])
def test_names_may_differ_in_their_prefix(tmp_path: Path, taken: str, added: str) -> None:
    folder, merged = adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "lm_head"], r=2)
    state = llama().state_dict()
    base = open_checkpoint({added + name.removeprefix(taken): value for name, value in state.items()})
    patched = values(with_adapter(base, open_adapter(folder)))
    assert furthest(patched, {added + name.removeprefix(taken): value for name, value in merged.items()}) < 1e-5


def test_a_prefix_that_could_be_two_is_refused() -> None:
    assert align(["a.w", "b.w"], ["x.a.w", "x.b.w", "y.a.w"]) == {"a.w": "x.a.w", "b.w": "x.b.w"}
    assert align(["x.a.w", "c"], ["a.w"]) == {"x.a.w": "a.w"}
    with pytest.raises(CheckpointError, match=r"'a.w' isn't there, and adding 'x.' or adding 'y.' finds 1 tensors each"):
        align(["a.w"], ["x.a.w", "y.a.w"])


def test_square_matrices_lie_as_their_like(tmp_path: Path) -> None:
    """peft corrects the setting by the layer's type; a file has no types, but has shapes."""
    folder, merged = adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], r=4, fan_in_fan_out=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    assert furthest(values(with_adapter(opened(gpt2), open_adapter(folder))), merged) < 1e-5
    write(tmp_path / "both", {"a": (4, 6), "b": (6, 4), "c": (5, 5)})
    model = open_checkpoint({"a.weight": np.zeros((4, 6), "f4"), "b.weight": np.zeros((4, 6), "f4"), "c.weight": np.eye(5)})
    with pytest.raises(CheckpointError, match=r"'c' is square, and others like it are stored both"):
        with_adapter(model, open_adapter(tmp_path / "both"))


def write(folder: Path, pairs: Mapping[str, tuple[int, int]], rank: int = 2, **config: Any) -> Path:
    """An adapter made by hand: its modules with their [out, in], and what its config has otherwise than usual."""
    extra = {name: np.asarray(value) for name, value in config.pop("tensors", {}).items()}
    random = np.random.default_rng(len(folder.name))
    tensors = dict(extra)
    for module, (rows, columns) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.standard_normal((rank, columns)).astype("f4")
        tensors[f"base_model.model.{module}.lora_B.weight"] = random.standard_normal((rows, rank)).astype("f4")
    folder.mkdir()
    save_file({name: value for name, value in tensors.items() if value.size}, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]; such an adapter"),
        ({"use_something": True}, "unknown setting use_something: True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the base's own"),
        ({"r": 0}, "r is 0; a positive number"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has '\(': 1"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
        ({"r": 5}, "'a' has rank 2, the config says 5"),
        ({"use_dora": True}, "'a' has no magnitude, use_dora is True"),
        ({"tensors": {"a.lora_E": np.ones(2, "f4")}}, "unknown tensor 'a.lora_E'"),
        (
            {"tensors": {"base_model.model.e.token_adapter.x": np.ones(2, "f4")}},
            "unknown tensor 'base_model.model.e.token_adapter",
        ),
        ({"tensors": {"z.lora_A.weight": np.ones((2, 3), "f4")}}, "'z' has A alone"),
        ({"tensors": {"a.lora_A.b.weight": np.ones((2, 3), "f4")}}, "are both A of 'a': more than one adapter"),
        ({"tensors": {"a.lora_A.bias": np.ones(2, "f4")}}, "unknown tensor 'a.lora_A.bias'"),
        ({"tensors": {"a.lora_B.bias": np.ones(7, "f4")}}, r"'a': bias F32\[7\] doesn't fit B"),
        ({"tensors": {"n.modules_to_save.x.w": np.ones(1, "f4"), "n.w": np.ones(1, "f4")}}, "are both saved for 'n.w'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_isnt_understood_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write(tmp_path / "adapter", {"a": (4, 3)}, **config))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tensors = {"z.lora_A.weight": np.ones((2, 3), "f4"), "q.lora_x": np.ones(1, "f4"), "a.lora_B.bias": np.ones(4, "i4")}
    with pytest.raises(CheckpointError) as caught:
        open_adapter(write(tmp_path / "adapter", {"a": (4, 3), "b": (4, 3)}, rank_pattern={"b": 1}, tensors=tensors))
    assert len(caught.value.problems) == 4
    with pytest.raises(CheckpointError) as caught:
        open_adapter(write(tmp_path / "other", {"a": (4, 3)}, use_bdlora={"x": 1}, r=-1, new=2))
    assert len(caught.value.problems) == 3


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config.json"):
        open_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="isn't a JSON object"):
        open_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    with pytest.raises(CheckpointError, match="no adapter's weights"):
        open_adapter(tmp_path / "adapter")
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        open_adapter(tmp_path / "adapter")


def test_factors_whose_product_is_no_weight(tmp_path: Path) -> None:
    tensors = {"z.lora_A.weight": np.ones((2, 3), "f4"), "z.lora_B.weight": np.ones((3, 4), "f4")}
    with pytest.raises(CheckpointError, match=r"'z': A is F32\[2, 3\] and B is F32\[3, 4\], whose product is no weight"):
        open_adapter(write(tmp_path / "adapter", {"a": (4, 3)}, tensors=tensors))


def test_everything_must_find_its_tensor(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.n.weight": np.ones(4, "f4"),
        "base_model.model.m.weight": np.ones(4, "f4"),
        "base_model.model.k": np.ones(4, "f4"),
        "base_model.model.c.lora_B.bias": np.ones(4, "f4"),
    }
    folder = write(tmp_path / "adapter", {"a": (4, 3), "b": (4, 3), "q": (4, 3), "c": (4, 3)}, tensors=tensors)
    arrays = {"a.weight": np.zeros((5, 3), "f4"), "n.weight": np.zeros(3, "f4"), "k": np.zeros(4, "i4")}
    arrays |= {"q.weight": np.zeros((4, 3), "i1"), "c.weight": np.zeros((4, 3), "f4"), "c.bias": np.zeros(3, "f4")}
    with pytest.raises(CheckpointError) as caught:
        with_adapter(replace(open_checkpoint(arrays), name="m"), open_adapter(folder))
    said = str(caught.value)
    assert len(caught.value.problems) == 7
    assert "'base_model.model.b.lora_A.weight' changes 'b.weight', which the model doesn't have" in said
    assert "'base_model.model.m.weight' changes 'm.weight', which the model doesn't have" in said
    assert "'base_model.model.n.weight' is F32[4], the model's 'n.weight' is F32[3]" in said
    assert "'base_model.model.k' is F32[4], the model's 'k' is I32[4]" in said
    assert "(4, 2) times 'base_model.model.a.lora_A.weight' (2, 3) doesn't fit the model's 'a.weight', F32[5, 3]" in said
    assert "the model's 'q.weight' is I8[4, 3]; an adapter is added to F64, F32, F16, BF16" in said
    assert "'base_model.model.c.lora_B.bias' is F32[4], the model's 'c.bias' is F32[3]" in said


def combined(first: Path, second: Path, out: Path, make: Make, weights: tuple[float, float]) -> float:
    """How far the model with the merged adapter is from the average of the models with the two."""
    models = [values(with_adapter(opened(make), open_adapter(folder))) for folder in (first, second, out)]
    share = weights[0] / sum(weights)
    return furthest(models[2], {name: share * models[0][name] + (1 - share) * models[1][name] for name in models[0]})


MERGES: list[tuple[Make, dict[str, Any], dict[str, Any]]] = [
    (
        llama,
        {**ATTENTION, "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "v_proj"], "r": 3, "use_rslora": True, "modules_to_save": ["norm"]},
    ),
    (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 2}, {"target_modules": ["embed_tokens"], "r": 2}),
    (convolutional, {"target_modules": ["a", "b", "c"], "r": 2}, {"target_modules": ["a", "c"], "r": 2}),
    (gpt2, {**GPT2, "r": 2, "lora_bias": True}, {**GPT2, "r": 3}),
    (gpt2, {**GPT2, "r": 2, "bias": "all"}, {**GPT2, "r": 3, "bias": "all"}),
]


@pytest.mark.parametrize(("make", "first", "second"), MERGES)
@pytest.mark.parametrize("method", ["linear", "svd", "knots"])
def test_merged_adapters_are_the_merged_models(
    tmp_path: Path, make: Make, first: dict[str, Any], second: dict[str, Any], method: str
) -> None:
    a, _ = adapter(make, tmp_path / "a", 1, **first)
    b, _ = adapter(make, tmp_path / "b", 2, **second)
    options: dict[str, Any] = {} if method == "linear" else {"rank": 7}
    options |= {"combine": "linear"} if method == "knots" else {}
    out = merge_adapters(method, [a, b], tmp_path / "out", weights=[1, 3], **options)
    assert combined(a, b, out, make, (1, 3)) < 1e-5
    loaded = peft.PeftModel.from_pretrained(make(), out).merge_and_unload().state_dict()
    assert furthest(values(with_adapter(opened(make), open_adapter(out))), loaded) < 1e-5


def test_a_merge_is_repeatable_and_its_seed_counts(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"x": (9, 8), "y": (9, 8)}), write(tmp_path / "bb", {"x": (9, 8), "y": (9, 8)})
    made = {}
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        out = merge_adapters("knots", [a, b], tmp_path / name, combine="dare_ties", density=[0.5, 0.6], seed=seed)
        made[name] = (out / "adapter_model.safetensors").read_bytes()
    assert made["one"] == made["two"] != made["three"]
    record = json.loads((tmp_path / "one" / "interfuse.json").read_text())
    assert record["options"]["density"] == [0.5, 0.6]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "interfuse.json",
    ]


def test_equal_adapters_give_themselves_and_types_are_as_asked(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": (9, 8)})
    model = open_checkpoint({"x.weight": np.zeros((9, 8), "f4")})
    expected = values(with_adapter(model, open_adapter(a)))
    for method in ("linear", "svd", "knots"):
        options: dict[str, Any] = {"density": 1.0} if method == "knots" else {}
        out = merge_adapters(method, [a, a], tmp_path / method, **options)
        assert furthest(values(with_adapter(model, open_adapter(out))), expected) < 1e-5
    summed = merge_adapters("linear", [a, a], tmp_path / "sum", normalize=False, dtype="bfloat16")
    assert open_adapter(summed).weights.specs["base_model.model.x.lora_A.weight"].dtype == "BF16"
    got = values(with_adapter(model, open_adapter(summed)))["x.weight"]
    np.testing.assert_allclose(got, 2 * expected["x.weight"], atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tias"}, "no adapters method is named 'tias'; did you mean 'ties'"),
        ({"method": "svd", "rank": 0}, "options.rank: got 0; at least 1"),
        ({"method": "svd", "rnk": 1}, "options.rnk: unknown option; did you mean 'rank'"),
        ({"method": "knots", "density": 1.5}, "options.density: got 1.5; at most 1"),
        ({"method": "knots", "density": [0.5]}, "options.density: got 1 values for 2 adapters"),
        ({"method": "linear", "weights": [1]}, "weights: got 1 for 2 adapters"),
        ({"method": "linear", "weights": [1, -1]}, "sum to 0"),
        ({"method": "linear", "dtype": "int8"}, "dtype: got 'int8'"),
    ],
    ids=str,
)
def test_options_of_a_merge_are_checked(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folders = [write(tmp_path / name, {"x": (9, 8)}) for name in ("a", "bb")]
    with pytest.raises(OptionError, match=message):
        merge_adapters(adapters=folders, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def refused(tmp_path: Path, *others: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge_adapters("linear", list(others), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_that_cant_be_merged_without_their_base(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": (9, 8)})
    magnitude = {"x.lora_magnitude_vector": np.ones(9, "f4")}
    dora = write(tmp_path / "dora", {"x": (9, 8)}, use_dora=True, tensors=magnitude)
    refused(tmp_path, a, dora, message=r"'x' has a magnitude \(DoRA\); merge the models")
    refused(tmp_path, a, write(tmp_path / "z", {"z": (9, 8)}), message="changes none of .*'s modules: 'z', not 'x'")
    refused(tmp_path, a, write(tmp_path / "size", {"x": (9, 7)}), message=r"'x' is \(9, 8\) \(matrix\) in .*, \(9, 7\)")
    refused(tmp_path, a, write(tmp_path / "f", {"x": (9, 8)}, fan_in_fan_out=True), message="fan_in_fan_out is True")
    whole = [write(tmp_path / f"w{i}", {"x": (9, 8)}, tensors={"n.w": np.full(3, i, "f4")}) for i in range(2)]
    refused(tmp_path, a, whole[0], message="'n.w' is saved whole by .*w0 alone")
    refused(tmp_path, *whole, message="'n.w' is saved whole, and the weights sum to 2", normalize=False)
    long = write(tmp_path / "w4", {"x": (9, 8)}, tensors={"n.w": np.ones(4, "f4")})
    refused(tmp_path, whole[0], long, message=r"'n.w' is F32\[3\], F32\[4\]")
    counts = [write(tmp_path / f"i{i}", {"x": (9, 8)}, tensors={"n.w": np.full(3, i)}) for i in range(2)]
    refused(tmp_path, *counts, message="the integers of 'n.w' differ")
    refused(tmp_path, a, tmp_path / "none", message="no adapter_config.json")


def tuned(make: Make, changes: Callable[[str], bool] = lambda name: True) -> nn.Module:
    model, generator = copy.deepcopy(make()), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            if changes(name):
                value.add_(noise)
    return model


def saved(tmp_path: Path, make: Make, changes: Callable[[str], bool] = lambda name: True) -> tuple[Path, Path]:
    make().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tuned(make, changes).save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    return tmp_path / "tuned", tmp_path / "base"


@pytest.mark.parametrize(
    ("make", "changes", "options"),
    [
        (llama, lambda name: True, {}),
        (llama, lambda name: True, {"embeddings": "lora"}),
        (llama, lambda name: "layers.1.self_attn" in name, {"others": "skip"}),
        (bert, lambda name: True, {}),
        (bert, lambda name: "LayerNorm.weight" not in name, {}),
        (gpt2, lambda name: "wte" not in name, {}),
    ],
)
def test_an_extracted_adapter_restores_the_fine_tune(
    tmp_path: Path, make: Make, changes: Callable[[str], bool], options: dict[str, Any]
) -> None:
    model, base = saved(tmp_path, make, changes)
    extraction = extract_lora(model, base, tmp_path / "out", rank=None, **options)
    assert extraction.error < 1e-6
    restored = with_adapter(open_checkpoint(base), open_adapter(tmp_path / "out"))
    assert furthest(values(restored), values(open_checkpoint(model))) < 1e-5
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    tokens = torch.arange(12).reshape(2, 6)
    assert (loaded(tokens).logits - tuned(make, changes)(tokens).logits).abs().max() < 1e-5
    changed = [name for name, value in values(restored).items() if (value != open_checkpoint(base).read(name)).any()]
    assert {item.name for item in extraction.tensors} == set(changed)


def test_ranks_follow_the_energy_and_losses_are_told(tmp_path: Path) -> None:
    model, base = saved(tmp_path, llama, lambda name: "proj" in name)
    errors = []
    for rank in (2, 4, 8):
        errors.append(extract_lora(model, base, tmp_path / str(rank), rank=rank).error)
    assert errors == sorted(errors, reverse=True)
    full = extract_lora(model, base, tmp_path / "full", rank=None, energy=0.9)
    assert all(item.error <= 0.1**0.5 + 1e-6 for item in full.tensors)
    assert len({item.rank for item in full.tensors}) > 1
    after, first = values(with_adapter(open_checkpoint(base), open_adapter(tmp_path / "4"))), values(open_checkpoint(base))
    wanted = values(open_checkpoint(model))
    lost = sum(float(((wanted[name] - after[name]).astype("f8") ** 2).sum()) for name in wanted)
    norm = sum(float(((wanted[name] - first[name]).astype("f8") ** 2).sum()) for name in wanted)
    assert errors[1] == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
    record = json.loads((tmp_path / "4" / "interfuse.json").read_text())
    assert record["error"] == errors[1]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    model, base = saved(tmp_path, llama)
    extraction = extract_lora(model, base, tmp_path / "out", rank=None, embeddings="skip", others="skip", dtype="bfloat16")
    left = {item.name for item in extraction.tensors if item.how == "skip"}
    assert "model.embed_tokens.weight" in left
    assert len(left) == 6
    assert all(item.error == 1 for item in extraction.tensors if item.name in left)
    assert extraction.error > 0.1
    assert open_adapter(tmp_path / "out").weights.specs["base_model.model.lm_head.lora_A.weight"].dtype == "BF16"
    assert open_adapter(tmp_path / "out").whole == {}
    fewer = extract_lora(model, base, tmp_path / "fewer", exclude=["*embed*", "*norm*", "lm_head.*"])
    assert {item.how for item in fewer.tensors} == {"lora"}
    assert not any("lm_head" in item.name for item in fewer.tensors)


def test_stored_turned_matrices_can_be_named(tmp_path: Path) -> None:
    before = {"a.weight": np.zeros((4, 6), "f4")}
    after = {"a.weight": np.arange(24, dtype="f4").reshape(4, 6)}
    extract_lora(after, before, tmp_path / "out", rank=None, transposed=["a.*"])
    opened_adapter = open_adapter(tmp_path / "out")
    assert opened_adapter.weights.specs["base_model.model.a.lora_B.weight"].shape == (6, 2)
    np.testing.assert_allclose(
        with_adapter(open_checkpoint(before), opened_adapter).read("a.weight"), after["a.weight"], atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0; a whole number from 1 on"),
        ({"energy": 1.5}, "energy: got 1.5; above 0 and at most 1"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"embeddings": "drop"}, "embeddings: got 'drop'; allowed: whole, lora, skip"),
        ({"others": "lora"}, "others: got 'lora'; allowed: whole, skip"),
    ],
)
def test_options_of_an_extraction_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        extract_lora({"a.weight": np.ones((2, 2))}, {"a.weight": np.zeros((2, 2))}, tmp_path / "out", **options)


def test_models_that_dont_fit_give_no_adapter(tmp_path: Path) -> None:
    def fails(after: dict[str, np.ndarray], before: dict[str, np.ndarray], message: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            extract_lora(after, before, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    ones, zeros = np.ones((3, 3), "f4"), np.zeros((3, 3), "f4")
    fails({"a.weight": ones}, {"a.weight": ones}, "no tensor differs from mapping's")
    fails({"a.weight": ones, "b": ones}, {"a.weight": zeros}, "tensor 'b' is missing")
    fails({"a.weight": ones}, {"a.weight": zeros, "c": ones}, "tensor 'c' is missing")
    fails({"a.weight": ones}, {"a.weight": np.zeros((4, 3), "f4")}, r"'a.weight' is F32\[3, 3\], the base's is F32\[4, 3\]")
    fails({"a.weight": ones}, {"a.weight": zeros.astype("i4")}, r"the base's is I32\[3, 3\]")
    fails({"a.weight": ones * np.nan}, {"a.weight": zeros}, "'a.weight' has values that aren't finite")
    fails({"a.weight": ones}, {"a.weight": zeros}, "'z' fits no tensor", exclude=["z"])
    fails({"token": ones[0]}, {"token": zeros[0]}, "'token' is in no module that peft could save")
    after, before = {"n.weight": ones[0], "n.bias": ones[0]}, {"n.weight": zeros[0], "n.bias": zeros[0]}
    fails(after, before, "'n.bias' is excluded, and peft saves its module whole", exclude=["n.bias"])


def test_modules_whose_names_end_alike_are_saved_together(tmp_path: Path) -> None:
    """peft takes `layernorm` for `norm`; what it then asks for must be there."""
    before = {name: np.zeros(3, "f4") for name in ("norm.weight", "a.layernorm.weight", "a.other.weight")}
    after = {**before, "norm.weight": np.ones(3, "f4")}
    extraction = extract_lora(after, before, tmp_path / "out")
    assert [item.name for item in extraction.tensors] == ["norm.weight"]
    assert list(open_adapter(tmp_path / "out").whole) == ["norm.weight", "a.layernorm.weight"]
