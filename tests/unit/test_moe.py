"""Mixtures of experts: folders that Transformers loads, logits of the dense model where experts are it, gates by their
formulas, mergekit-moe's files as they are, and everything wrong before anything is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import interfuse
from interfuse.checkpoints.source import open_checkpoint
from interfuse.cli import main
from interfuse.errors import CheckpointError, ModelError, OptionError, RecipeError, UserError
from interfuse.mixture.recipe import load_mixture

transformers = pytest.importorskip("transformers")

WORDS = ["<s>", "</s>", "<unk>", "sums", "proofs", "poems", "rhymes", "code", "loops", "a", "b", "c"]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 3}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
}
TOKENS = torch.tensor([[0, 5, 3, 9, 11, 7], [0, 4, 6, 8, 10, 2]])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers' own warnings aren't what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dense(kind: str, seed: int, **options: Any) -> Any:
    config, model, own = KINDS[kind]
    torch.manual_seed(seed)
    network = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **own, **options})).eval()
    with torch.no_grad():
        for value in network.parameters():  # as initialised, states hardly differ
            value.add_(torch.randn_like(value) * 0.2)
    return network


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def saved(folder: Path, kind: str = "llama", seed: int = 0, **options: Any) -> Path:
    dense(kind, seed, **options).save_pretrained(folder, max_shard_size="20KB")
    tokenizer(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts, Llamas, in shards."""
    for seed, name in enumerate(("base", "a", "b")):
        saved(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**more: Any) -> dict[str, Any]:
    experts = [
        {"source_model": "a", "positive_prompts": ["sums proofs", "proofs"], "negative_prompts": ["poems"]},
        {"source_model": "b", "positive_prompts": ["poems rhymes"]},
    ]
    return {"base_model": "base", "experts": experts, **more}


def alike(count: int = 2, **more: Any) -> dict[str, Any]:
    """The base as every expert."""
    return {"base_model": "base", "experts": [{"source_model": "base"}] * count, "gate_mode": "random", **more}


def loaded(folder: Path) -> nn.Module:
    """The folder as Transformers loads it: no key missing, none left over."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    network, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return network.eval()


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network(TOKENS).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "options", "more", "architecture"),
    [
        ("llama", {}, {}, "MixtralForCausalLM"),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}, {}, "MixtralForCausalLM"),
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}, {}, "MixtralForCausalLM"),
        ("mistral", {}, {}, "MixtralForCausalLM"),
        ("qwen2", {}, {}, "Qwen2MoeForCausalLM"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, {}, "Qwen2MoeForCausalLM"),
        ("llama", {}, {"architecture": "Qwen MoE"}, "Qwen2MoeForCausalLM"),
        ("mistral", {}, {"architecture": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ("qwen3", {}, {}, "Qwen3MoeForCausalLM"),
        ("qwen3", {"attention_bias": True}, {}, "Qwen3MoeForCausalLM"),
    ],
)
def test_experts_that_are_the_base_give_its_logits(
    tmp_path: Path, kind: str, options: dict[str, Any], more: dict[str, Any], architecture: str
) -> None:
    base = saved(tmp_path / "base", kind, **options)
    experts = [{"source_model": str(base)}] * 3
    made = interfuse.moe({"base_model": str(base), "experts": experts, "gate_mode": "random", **more}, tmp_path / "out")
    assert made.layout == architecture
    network = loaded(tmp_path / "out")
    assert float((logits(network) - logits(dense(kind, 0, **options))).abs().max()) < 1e-5
    assert type(network).__name__ == architecture


def test_a_config_that_leaves_out_its_defaults_means_what_it_meant(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", num_key_value_heads=4)
    path = base / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "num_key_value_heads", "rms_norm_eps", "hidden_act", "head_dim", "tie_word_embeddings"):
        config.pop(key)
    path.write_text(json.dumps(config))
    plain = loaded(base)
    interfuse.moe({**alike(), "base_model": str(base), "experts": [{"source_model": str(base)}] * 2}, tmp_path / "out")
    assert float((logits(loaded(tmp_path / "out")) - logits(plain)).abs().max()) < 1e-5


class Deepseek(nn.Module):
    """DeepSeekMoE's block from its paper, section 3: softmax over all, the k largest to sum 1, the shared expert added."""

    def __init__(self, found: dict[str, Tensor], head: str, experts: int, top: int):
        super().__init__()
        self.found, self.head, self.experts, self.top = found, head, experts, top

    def block(self, name: str, x: Tensor) -> Tensor:
        gate, up, down = (self.found[f"{self.head}{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x: Tensor) -> Tensor:
        share = (x @ self.found[f"{self.head}gate.weight"].T).softmax(-1)
        best, chosen = share.topk(self.top, -1)
        best = best / best.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for k in range(self.top):
            for expert in range(self.experts):
                here = (chosen[..., k] == expert)[..., None]
                result = result + here * best[..., k : k + 1] * self.block(f"experts.{expert}", x)
        shared = f"{self.head}shared_experts.up_proj.weight" in self.found
        return result + self.block("shared_experts", x) if shared else result


@pytest.mark.parametrize("shared", [False, True])
def test_deepseeks_layout_by_its_formula(work: Path, shared: bool) -> None:
    more = {"shared_experts": [{"source_model": "base", "residual_scale": 0.0}]} if shared else {}
    interfuse.moe(alike(3, architecture="DeepSeek MoE", **more), "out")
    found, config = tensors(work / "out"), json.loads((work / "out" / "config.json").read_text())
    assert (config["model_type"], config["n_routed_experts"], config["num_experts_per_tok"]) == ("deepseek", 3, 2)
    assert (config["n_shared_experts"], config["norm_topk_prob"], config["rope_theta"]) == (
        1 if shared else None,
        True,
        10000.0,
    )
    network: Any = dense("llama", 0)
    for i, layer in enumerate(network.model.layers):
        layer.mlp = Deepseek(found, f"model.layers.{i}.mlp.", 3, 2)
    assert float((logits(network) - logits(dense("llama", 0))).abs().max()) < 1e-5
    rest = {name: value for name, value in found.items() if ".mlp." not in name}
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in rest.items())
    assert len(rest) == 2 * 6 + 3


def test_experts_are_bit_for_bit_where_they_belong(work: Path) -> None:
    interfuse.moe(recipe(), "out")
    found = tensors(work / "out")
    for i, name in enumerate("ab"):
        expert = tensors(work / name)
        for layer in range(2):
            for part, known in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
                mine = found[f"model.layers.{layer}.block_sparse_moe.experts.{i}.{known}.weight"]
                assert torch.equal(mine, expert[f"model.layers.{layer}.mlp.{part}_proj.weight"])
    base = tensors(work / "base")
    assert all(torch.equal(found[name], value) for name, value in base.items() if ".mlp." not in name)
    assert not [name for name in found if name.endswith("_proj.weight") and ".mlp." in name]


def states(prompts: list[str], layer: int, mean: bool = False) -> Tensor:
    """The states that enter a layer of the base, each prompt read alone: the last token's, or the mean; their mean."""
    network = dense("llama", 0).double()
    each = []
    for prompt in prompts:
        tokens = torch.tensor([[0, *(WORDS.index(word) for word in prompt.split())]])
        with torch.no_grad():
            state = network(tokens, output_hidden_states=True).hidden_states[layer][0]
        each.append(state.mean(0) if mean else state[-1])
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_gates_are_the_states_of_the_prompts(work: Path, mode: str) -> None:
    interfuse.moe(recipe(gate_mode=mode), "out")
    found = tensors(work / "out")
    mean = mode == "hidden_avg"
    for layer in range(2):
        first = states(["sums proofs", "proofs"], layer, mean) - states(["poems"], layer, mean)
        second = states(["poems rhymes"], layer, mean)
        wanted = torch.stack([first / first.norm(), second / second.norm()])
        gates = found[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert float((gates - wanted).abs().max()) < 1e-5


def test_cheap_gates_are_mean_embeddings_alike_in_all_layers(work: Path) -> None:
    interfuse.moe(recipe(gate_mode="cheap_embed"), "out")
    found = tensors(work / "out")
    rows = found["model.embed_tokens.weight"].double()

    def direction(*words: str) -> Tensor:
        total = rows[[WORDS.index(word) for word in words]].sum(0)
        return total / total.norm()

    first = direction("<s>", "sums", "proofs", "<s>", "proofs") - direction("<s>", "poems")
    wanted = torch.stack([first / first.norm(), direction("<s>", "poems", "rhymes")])
    for layer in range(2):
        assert float((found[f"model.layers.{layer}.block_sparse_moe.gate.weight"] - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize(("mode", "spread"), [("random", 1.0), ("uniform_random", (1 / 32 / 3) ** 0.5)])
def test_random_gates_go_by_the_seed(work: Path, mode: str, spread: float) -> None:
    def gates(out: str, **options: Any) -> Tensor:
        interfuse.moe(recipe(gate_mode=mode), out, **options)
        found = tensors(work / out)
        return torch.stack([found[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)])

    first = gates("one")
    assert torch.equal(first, gates("two"))
    assert not torch.equal(first, gates("three", seed=5))
    assert not torch.equal(first[0], first[1])
    assert float(first.std()) == pytest.approx(spread, rel=0.2)


def test_a_shared_expert_with_a_gate(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        saved(tmp_path / name, seed=seed)
    experts = [{"source_model": str(tmp_path / n), "positive_prompts": [p]} for n, p in (("a", "sums"), ("b", "poems"))]
    shared = {"source_model": str(tmp_path / "a"), "positive_prompts": ["code loops"], "residual_scale": 0.5}
    content = {"base_model": str(tmp_path / "base"), "experts": experts, "shared_experts": [shared], "experts_per_token": 1}
    made = interfuse.moe(content, tmp_path / "out")
    assert (made.layout, made.notes) == ("Qwen2MoeForCausalLM", ())
    loaded(tmp_path / "out")
    found, expert = tensors(tmp_path / "out"), tensors(tmp_path / "a")
    head = "model.layers.1.mlp."
    assert torch.equal(found[f"{head}shared_expert.up_proj.weight"], expert[f"{head}up_proj.weight"])
    assert torch.equal(found[f"{head}shared_expert.down_proj.weight"], 0.5 * expert[f"{head}down_proj.weight"])
    assert torch.equal(found[f"{head}experts.0.down_proj.weight"], expert[f"{head}down_proj.weight"])
    assert float(found[f"{head}shared_expert_gate.weight"].norm()) == pytest.approx(1, abs=1e-6)
    shared.pop("positive_prompts")
    made = interfuse.moe({**content, "architecture": "qwen2_moe"}, tmp_path / "open")
    assert "residual_scale: 2 adds all of it" in made.notes[0]
    assert not tensors(tmp_path / "open")[f"{head}shared_expert_gate.weight"].any()


def test_where_none_is_given_the_shared_expert_adds_nothing_and_can_learn(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "qwen2", intermediate_size=96)
    experts = [{"source_model": str(base)}] * 2
    made = interfuse.moe({"base_model": str(base), "experts": experts, "gate_mode": "random"}, tmp_path / "out")
    assert any("adds nothing" in note for note in made.notes)
    found, dense_tensors = tensors(tmp_path / "out"), tensors(base)
    up = found["model.layers.0.mlp.shared_expert.up_proj.weight"]
    assert torch.equal(up, dense_tensors["model.layers.0.mlp.up_proj.weight"][:64])
    assert not found["model.layers.0.mlp.shared_expert.down_proj.weight"].any()


def test_noise_is_of_its_scale_and_repeatable(work: Path) -> None:
    content = alike(2)
    content["experts"] = [{"source_model": "base"}, {"source_model": "base", "noise_scale": 0.01}]
    interfuse.moe(content, "one")
    interfuse.moe(content, "two", threads=1)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    first, second = (tensors(work / out)[name.format(1)] for out in ("one", "two"))
    plain = tensors(work / "one")[name.format(0)]
    assert torch.equal(first, second)
    assert float((first - plain).std()) == pytest.approx(0.01, rel=0.1)


def test_types_and_files_that_come_along(work: Path) -> None:
    (work / "base" / "chat_template.jinja").write_text("{{ messages }}")
    interfuse.moe(recipe(dtype="bfloat16"), "out")
    assert {value.dtype for value in tensors(work / "out").values()} == {torch.bfloat16}
    config = json.loads((work / "out" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert (work / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (work / "out" / "tokenizer.json").read_bytes() == (work / "base" / "tokenizer.json").read_bytes()
    record = json.loads((work / "out" / "interfuse.json").read_text())
    assert (record["kind"], record["method"]) == ("mixture", "mixtral")
    assert [Path(source["model"]).name for source in record["sources"]] == ["base", "a", "b"]
    assert record["output"] == open_checkpoint(work / "out").hash()
    card = (work / "out" / "README.md").read_text()
    assert "# MixtralForCausalLM of 2 experts" in card
    assert load_mixture(work / "out" / "recipe.yaml") == load_mixture(recipe(dtype="bfloat16"))
    assert type(interfuse.load_run(work / "out")).__name__ == "MixtralForCausalLM"


def test_adapters_and_files_of_weights_are_experts_too(work: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(dense("llama", 1), peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(work / "lora")
    wanted = adapted.merge_and_unload().state_dict()["model.layers.0.mlp.up_proj.weight"]
    one = dense("llama", 2)
    one.save_pretrained(work / "single")
    content = recipe()
    content["experts"][0]["source_model"] = "a+lora"
    content["experts"][1]["source_model"] = "single/model.safetensors"
    interfuse.moe(content, "out")
    found = tensors(work / "out")
    head = "model.layers.0.block_sparse_moe.experts."
    assert float((found[f"{head}0.w3.weight"] - wanted).abs().max()) < 1e-6
    assert torch.equal(found[f"{head}1.w3.weight"], one.state_dict()["model.layers.0.mlp.up_proj.weight"])


def test_a_base_with_an_adapter_reads_the_prompts_with_it(work: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(dense("llama", 0), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(work / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(work / "merged")
    tokenizer(work / "merged")
    interfuse.moe(recipe(base_model="base+lora"), "one")
    interfuse.moe(recipe(base_model="merged"), "two")
    one, two = tensors(work / "one"), tensors(work / "two")
    assert all(float((one[name] - two[name]).abs().max()) < 1e-5 for name in two)


FILE = """
base_model: ./base
gate_mode: cheap_embed # one of "hidden", "cheap_embed", or "random"
dtype: float16
experts:
  - source_model: ./a
    positive_prompts:
      - "sums proofs"
    ## (optional)
    negative_prompts: ["poems"]
  - source_model: {model: {path: ./b}}
    positive_prompts: ["poems"]
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out, err


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "moe.yml").write_text(FILE)
    monkeypatch.chdir("/")
    arguments = ("moe", str(work / "moe.yml"), str(work / "out"))
    code, out, err = call(capsys, *arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert "MixtralForCausalLM: 2 experts in 2 layers, 2 a token" in out
    assert out.rstrip().endswith("nothing was written (dry run)")
    assert not (work / "out").exists()
    code, out, _ = call(capsys, *arguments, "--json", "--threads", "1", "--device", "cpu", "--seed", "3")
    record = json.loads(out)
    assert (code, record["layout"], record["seed"], len(record["experts"])) == (0, "MixtralForCausalLM", 3, 2)
    code, _, err = call(capsys, *arguments)
    assert (code, "is there already" in err) == (2, True)
    code, out, _ = call(capsys, *arguments, "--overwrite")
    assert (code, "MixtralForCausalLM of 2 experts, in" in out) == (0, True)
    assert {value.dtype for value in tensors(work / "out").values()} == {torch.float16}


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["experts"][0].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(experts_per_tokn=1), "experts_per_tokn: unknown key; did you mean 'experts_per_token'"),
        (
            lambda c: c["experts"][1].update(positiv_prompts=["a"]),
            r"experts\[1\].positiv_prompts: unknown key; did you mean 'positive_prompts'",
        ),
        (lambda c: c.update(experts_per_token=3), "experts_per_token: got 3; from 1 to 2, the number of experts"),
        (lambda c: c.update(experts_per_token=0), "experts_per_token: got 0; at least 1"),
        (lambda c: c.update(gate_mode="hiden"), "gate_mode: got 'hiden'; allowed: 'hidden'"),
        (lambda c: c.update(dtype="bf17"), "dtype: got 'bf17'"),
        (lambda c: c.update(architecture="mixtrel"), "architecture: got 'mixtrel'; did you mean 'mixtral'"),
        (without("positive_prompts"), r"experts\[0\].positive_prompts: missing; gate_mode hidden needs one or more"),
        (lambda c: c["experts"][0].update(positive_prompts=[]), r"experts\[0\].positive_prompts: got \[\]"),
        (without("source_model"), r"experts\[0\].source_model: missing; give a value"),
        (lambda c: c.update(experts=[]), "experts: got"),
        (lambda c: c.update(shared_experts=[{"source_model": "a"}] * 2), "shared_experts: got 2; no layout has more than one"),
        (
            lambda c: c.update(experts=[{"source_model": n, "positive_prompts": ["a"]} for n in "ab"]),
            "experts: the prompts are the same for all, and so would the gates be",
        ),
    ],
)
def test_recipes_that_cant_be_read(work: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    content = recipe()
    change(content)
    with pytest.raises(RecipeError, match=message):
        interfuse.moe(content, "out")
    assert not (work / "out").exists()


def test_what_else_is_wrong_is_told_beside_values_of_the_wrong_form(tmp_path: Path) -> None:
    experts = [{"source_model": "b", "positive_prompt": ["a"]}, {"source_model": "c"}]
    content = {"base_model": "a", "gate_mode": "hiden", "dtype": "bf", "experts_per_token": 5, "experts": experts}
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError) as raised:
        interfuse.moe(content, tmp_path / "out", device="tpu")
    places = [problem.path for problem in raised.value.problems]
    wanted = ["device", "experts[0].positive_prompt", "gate_mode", "experts_per_token", "dtype", str(tmp_path / "out")]
    assert places == wanted
    with pytest.raises(UserError) as raised:
        load_mixture({"base_model": "a", "experts": 3, "dtype": "q"})
    assert [problem.path for problem in raised.value.problems] == ["experts", "dtype"]


def test_all_that_is_wrong_in_a_recipe_comes_at_once(work: Path) -> None:
    content = recipe(experts_per_token=9, dtype="bf17", architecture="zzz")
    content["experts"][1].pop("positive_prompts")
    with pytest.raises(RecipeError) as caught:
        interfuse.moe(content, "out")
    assert [problem.path for problem in caught.value.problems] == [
        "experts_per_token",
        "dtype",
        "architecture",
        "experts[1].positive_prompts",
    ]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"intermediate_size": 64}, r"c: tensor 'model.layers.0.mlp.gate_proj.weight' is F32\[64, 32\], "),
        ("llama", {"num_hidden_layers": 1}, "c: has 1 layers, the base has 2"),
        ("qwen3", {}, "c: model_type is 'qwen3', the base's is 'llama'"),
        ("llama", {"hidden_act": "gelu"}, "c: hidden_act is 'gelu', the base's is 'silu'"),
    ],
)
def test_experts_that_dont_fit(work: Path, kind: str, options: dict[str, Any], message: str) -> None:
    saved(work / "c", kind, **options)
    content = recipe()
    content["experts"][1]["source_model"] = "c"
    with pytest.raises(CheckpointError, match=message) as caught:
        interfuse.moe(content, "out")
    if "intermediate_size" in options:
        assert len(caught.value.problems) == 6
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options", "more", "error", "message"),
    [
        ("llama", {"attention_bias": True}, {}, CheckpointError, "tensor 'model.layers.0.self_attn.q_proj.bias' has no place"),
        ("llama", {"head_dim": 16}, {"architecture": "deepseek"}, CheckpointError, "head_dim 16 times 4 heads"),
        ("mistral", {}, {"architecture": "deepseek"}, CheckpointError, "sliding_window is 3; deepseek has none"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
            {},
            CheckpointError,
            "sliding_window 3 is that of some layers alone",
        ),
        ("qwen3", {}, {"architecture": "mixtral"}, OptionError, "'mixtral' can't be made from qwen3; allowed: qwen3_moe"),
        ("llama", {}, {"architecture": "mixtral", "shared_experts": [{}]}, OptionError, "mixtral has no shared expert"),
        (
            "llama",
            {},
            {"architecture": "deepseek", "shared_experts": [{"positive_prompts": ["a"]}]},
            OptionError,
            "deepseek has no shared expert with a gate; remove the prompts",
        ),
    ],
)
def test_bases_that_a_layout_cant_hold(
    tmp_path: Path, kind: str, options: dict[str, Any], more: dict[str, Any], error: type[UserError], message: str
) -> None:
    base = str(saved(tmp_path / "base", kind, **options))
    content = {"base_model": base, "experts": [{"source_model": base}] * 2, "gate_mode": "random", **more}
    for shared in content.get("shared_experts", []):
        shared["source_model"] = base
    with pytest.raises(error, match=message):
        interfuse.moe(content, tmp_path / "out")


def test_other_bases(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    content = {"base_model": str(tmp_path / "gpt2"), "experts": [{"source_model": str(tmp_path / "gpt2")}] * 2}
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'; a dense model of llama, mistral, qwen2, qwen3"):
        interfuse.moe({**content, "gate_mode": "random"}, tmp_path / "out")
    bare = saved(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    prompts = [{"source_model": str(bare), "positive_prompts": [p]} for p in ("sums", "poems")]
    with pytest.raises(ModelError, match="has no tokenizer to read the prompts with"):
        interfuse.moe({"base_model": str(bare), "experts": prompts}, tmp_path / "out")
    (bare / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        interfuse.moe({"base_model": str(bare), "experts": prompts}, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"device: got 'tpu'; cpu or cuda\n.*has no config.json"):
        interfuse.moe({"base_model": str(bare), "experts": prompts}, tmp_path / "out", device="tpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_prompts_that_leave_nothing(work: Path, mode: str) -> None:
    content = recipe(gate_mode=mode)
    content["experts"][1]["negative_prompts"] = ["poems rhymes"]
    with pytest.raises(ModelError, match=r"experts\[1\]: the positive prompts less the negative ones leave nothing"):
        interfuse.moe(content, "out")
    content["experts"][1]["negative_prompts"] = [""]
    with pytest.raises(ModelError, match="prompts: '' gives no token"):
        interfuse.moe(content, "out")
    assert not (work / "out").exists()


def test_the_router_sends_prompts_to_their_experts(work: Path) -> None:
    """The point of it all: a text like an expert's prompts goes to that expert first."""
    content = recipe(gate_mode="cheap_embed", experts_per_token=1)
    content["experts"] = [
        {"source_model": "a", "positive_prompts": ["sums proofs"]},
        {"source_model": "b", "positive_prompts": ["poems rhymes"]},
    ]
    interfuse.moe(content, "out")
    found = tensors(work / "out")
    rows = found["model.embed_tokens.weight"]
    gates = found["model.layers.0.block_sparse_moe.gate.weight"]
    first = (gates @ rows[[WORDS.index(word) for word in ("sums", "proofs")]].sum(0)).argmax()
    second = (gates @ rows[[WORDS.index(word) for word in ("poems", "rhymes")]].sum(0)).argmax()
    assert (int(first), int(second)) == (0, 1)
    assert np.isfinite(logits(loaded(work / "out")).numpy()).all()
