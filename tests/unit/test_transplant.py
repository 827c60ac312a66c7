"""`transplant` and `build`: what goes where, against slow references; the report has every tensor; nothing changes on error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import interfuse as itf
from interfuse.checkpoints.source import BLOCK, Checkpoint, open_checkpoint
from interfuse.errors import CheckpointError, ModelError, OptionError
from interfuse.transfer.report import ACTIONS, Report


def put(source: Any, target: Any, rules: Any = None, **options: Any) -> Report:
    """`transplant`, quietly; every tensor of the target is in the report once."""
    report = itf.transplant(source, target, rules, show=False, **options)
    assert [row.name for row in report.rows] == list(open_checkpoint(target).specs)
    assert sum(len(report.names(action)) for action in ACTIONS) == len(report.rows)
    return report


def stack(layers: int, width: int = 3, name: str = "layers") -> dict[str, Tensor]:
    return {f"{name}.{i}.weight": torch.full((width,), float(i)) for i in range(layers)}


def layers_of(tensors: dict[str, Tensor], name: str = "layers") -> list[float]:
    return [tensors[f"{name}.{i}.weight"][0].item() for i in range(len(tensors))]


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def test_by_name_and_shape_with_buffers() -> None:
    source, target = convolutions(), convolutions()
    source(torch.randn(8, 1, 4, 4))  # its running statistics move
    target[4] = nn.Linear(16, 7)
    before = state_of(target)
    report = put(source, target)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("4.") else source.state_dict()[name])
    assert report.names("copied") == [name for name in before if not name.startswith("4.")]
    assert report.names("skipped") == ["4.weight", "4.bias"]
    assert report.parameters("copied") == 4 * 9 + 4 + 4 * 4 + 1
    assert "shape [5, 16] into [7, 16]" in str(report)
    assert "'pad' would fit it" in str(report)


def test_a_map_of_patterns_renames_and_leaves_out() -> None:
    source = {"encoder.layer.0.w": torch.ones(2), "encoder.layer.1.w": torch.full((2,), 2.0), "encoder.head": torch.ones(2)}
    target = {"layers.0.w": torch.zeros(2), "layers.1.w": torch.zeros(2), "head": torch.zeros(2)}
    report = put(source, target, {"encoder.layer.*": "layers.*", "encoder.*": None})
    assert [value[0].item() for value in target.values()] == [1, 2, 0]
    assert report.names("left") == ["head"]
    assert report.unused == {"encoder.head": "left out by a rule"}
    assert "layers.*.w <- encoder.layer.*.w" in str(report)


def test_rules_that_fit_nothing_or_clash_are_all_told_and_nothing_changes() -> None:
    source, target = {"a.0": torch.ones(2), "b.0": torch.ones(2)}, {"a.0": torch.zeros(2)}
    with pytest.raises(OptionError) as error:
        put(source, target, {"b.*": "a.*", "c.*": "a.*", "a.0": "*"})
    text = str(error.value)
    assert "rules['c.*']: fits no tensor of the source" in text
    assert "rules['a.0']: has 0 *, and '*' has 1" in text
    with pytest.raises(OptionError, match=r"tensor 'a.0': is given both 'a.0' and 'b.0'"):
        put(source, target, {"b.*": "a.*"})
    assert target["a.0"].sum() == 0


def test_a_prefix_of_all_names_is_passed_over_and_said() -> None:
    source, target = {f"model.{k}": v for k, v in stack(3).items()}, stack(3)
    target = {name: torch.zeros_like(value) for name, value in target.items()}
    report = put(source, target)
    assert layers_of(target) == [0, 1, 2]
    assert "'model.'" in report.caption()


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("spread", [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1]),
        ("repeat", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        ({"layers": "spread"}, [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1]),
        ({"layers": {0: 11, 5: [0, 1]}}, [5, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0]),
        (None, [0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1, -1]),
    ],
)
def test_six_layers_into_twelve(depth: Any, expected: list[float]) -> None:
    target = {name: torch.full_like(value, -1) for name, value in stack(12).items()}
    put(stack(6), target, depth=depth)
    assert layers_of(target) == expected


@pytest.mark.parametrize("word", ["spread", "repeat"])
def test_twelve_layers_into_six_are_every_second(word: str) -> None:
    target = stack(6)
    report = put(stack(12), target, depth=word)
    assert layers_of(target) == [0, 2, 4, 6, 8, 10]
    assert list(report.unused) == [f"layers.{i}.weight" for i in range(1, 12, 2)]


def test_rules_come_before_layers_and_layers_can_be_moved_within_one_network() -> None:
    target = {name: torch.full_like(value, -1) for name, value in stack(4).items()}
    put(stack(2, name="enc.layer"), target, {"enc.layer.*": "layers.*"}, depth={"layers": "spread"})
    assert layers_of(target) == [0, -1, 1, -1]
    own = stack(3)
    put(own, own, depth={"layers": {0: 2, 2: 0, 1: 1}})
    assert layers_of(own) == [2, 1, 0]


def test_wrong_layers_are_all_told() -> None:
    with pytest.raises(OptionError) as error:
        put(stack(2), stack(4), depth={"layers": {0: 9, 7: 1, 1: 1}, "blocks": "spread"})
    parts = ("the source has no layer 7; it has 0 to 1", "the target has no layer 9", "layer 1 of the target is given twice")
    for part in parts:
        assert part in str(error.value)
    assert "depth['blocks']: no layers of the target are numbered below it" in str(error.value)
    with pytest.raises(OptionError, match="got 'spreed'; did you mean 'spread'"):
        put(stack(2), stack(4), depth={"layers": "spreed"})


def test_crop_and_pad() -> None:
    source = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3.0)}
    target = {"w": torch.ones(5, 2), "b": torch.ones(3)}
    assert put(source, target, adapt="crop").names("skipped") == ["w"]
    report = put(source, target, adapt=["crop", "pad"])
    expected = np.zeros((5, 2))
    expected[:3] = source["w"][:, :2]
    assert np.array_equal(target["w"].numpy(), expected)
    assert report.names("adapted") == ["w"]
    assert report.rows[0].how == "axis 0: 3 padded with zeros to 5; axis 1: 4 cut to 2"


def test_ways_by_pattern_and_wrong_ones() -> None:
    source, target = {"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    report = put(source, target, adapt={"a": "crop"})
    assert (report.names("adapted"), report.names("skipped")) == (["a"], ["b"])
    with pytest.raises(OptionError, match=r"adapt\['c'\]: fits no tensor of the target"):
        put(source, target, adapt={"c": "crop"})
    with pytest.raises(OptionError, match="adapt: got 'corp'; did you mean 'crop'"):
        put(source, target, adapt="corp")


@pytest.mark.parametrize(("s", "t"), [(7, 3), (3, 7), (5, 4)])
def test_kernels_about_their_centre(s: int, t: int) -> None:
    source, target = {"conv.weight": torch.randn(2, 3, s, s)}, {"conv.weight": torch.ones(2, 3, t, t)}
    put(source, target, adapt="kernels")
    expected = torch.zeros(2, 3, t, t)
    for i in range(t):
        for j in range(t):
            y, x = i + (s - t) // 2 if s > t else i - (t - s) // 2, j + (s - t) // 2 if s > t else j - (t - s) // 2
            if 0 <= y < s and 0 <= x < s:
                expected[:, :, i, j] = source["conv.weight"][:, :, y, x]
    assert torch.equal(target["conv.weight"], expected)


def cubic(grid: np.ndarray, size: int) -> np.ndarray:
    """Keys' cubic convolution (1981), a = -0.75, a sum over sixteen neighbours, the border repeated; float64."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    n = grid.shape[0]
    out = np.zeros((size, size, grid.shape[2]))
    for i in range(size):
        for j in range(size):
            y, x = (i + 0.5) * n / size - 0.5, (j + 0.5) * n / size - 0.5
            for u in range(math.floor(y) - 1, math.floor(y) + 3):
                for v in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = grid[min(max(u, 0), n - 1), min(max(v, 0), n - 1)]
                    out[i, j] += kernel(y - u) * kernel(x - v) * value
    return out


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_positions_are_interpolated_and_class_tokens_kept(size: int, extra: int) -> None:
    source = {"pos_embed": torch.randn(1, extra + 16, 5, dtype=torch.float64)}
    target = {"pos_embed": torch.zeros(1, extra + size**2, 5, dtype=torch.float64)}
    put(source, target, adapt="positions")
    own, new = source["pos_embed"][0].numpy(), target["pos_embed"][0].numpy()
    assert np.array_equal(new[:extra], own[:extra])
    assert np.allclose(new[extra:], cubic(own[extra:].reshape(4, 4, 5), size).reshape(-1, 5), atol=1e-12)


def test_positions_that_are_no_grid_stay_out() -> None:
    source, target = {"pos_embed": torch.randn(1, 12, 5), "x": torch.ones(1)}, {"pos_embed": torch.zeros(1, 20, 5)}
    report = put(source, target | {"x": torch.zeros(1)}, adapt="positions")
    assert report.rows[0].how.endswith("the positions are no square grid")


def test_the_first_heads_of_fused_and_single_projections() -> None:
    width, per_head = 8, 2
    names = {"attn.in_proj_weight": (3 * width, 8), "attn.q.weight": (width, 8), "attn.out.weight": (8, width)}
    source = {name: torch.randn(shape) for name, shape in names.items()}
    kept = 3 * per_head
    target = {
        "attn.in_proj_weight": torch.zeros(3 * kept, 8),
        "attn.q.weight": torch.zeros(kept, 8),
        "attn.out.weight": torch.zeros(8, kept),
    }
    put(source, target, adapt="heads")
    fused = source["attn.in_proj_weight"].reshape(3, 4, per_head, 8)[:, :3].reshape(3 * kept, 8)
    assert torch.equal(target["attn.in_proj_weight"], fused)
    assert torch.equal(target["attn.q.weight"], source["attn.q.weight"][:kept])
    assert torch.equal(target["attn.out.weight"], source["attn.out.weight"][:, :kept])


def test_thirds_lie_along_the_second_axis_where_weights_are_stored_the_other_way() -> None:
    source, target = {"h.0.attn.c_attn.weight": torch.randn(6, 18)}, {"h.0.attn.c_attn.weight": torch.zeros(6, 12)}
    put(source, target, adapt="heads")
    expected = source["h.0.attn.c_attn.weight"].reshape(6, 3, 6)[:, :, :4].reshape(6, 12)
    assert torch.equal(target["h.0.attn.c_attn.weight"], expected)


def test_rows_by_token() -> None:
    source = {"embed_tokens.weight": torch.randn(4, 3), "lm_head.weight": torch.randn(4, 3), "norm.weight": torch.ones(3)}
    target = {"embed_tokens.weight": torch.zeros(5, 3), "lm_head.weight": torch.zeros(5, 3), "norm.weight": torch.zeros(3)}
    report = put(source, target, vocabulary=({"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 2}))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        zero = torch.zeros(3)
        assert torch.equal(target[name], torch.stack([source[name][2], zero, source[name][0], zero, zero]))
    assert report.names("adapted") == ["embed_tokens.weight", "lm_head.weight"]
    assert report.rows[0].how == "rows of 2 of 3 tokens; the others as they were"
    half = {name: value.half() for name, value in target.items()}
    put(source, half, vocabulary=({"a": 0}, {"a": 1}))
    assert torch.equal(half["lm_head.weight"][1], source["lm_head.weight"][0].half())
    with pytest.raises(CheckpointError, match="numbers too large for F16"):
        put({name: value * 1e6 for name, value in source.items()}, half, vocabulary=({"a": 0}, {"a": 1}))
    with pytest.raises(OptionError, match="'z' has row 9 of 4"):
        put(source, target, vocabulary=({"z": 9}, {"z": 0}))
    with pytest.raises(OptionError, match="share no token"):
        put(source, target, vocabulary=({"z": 1}, {"y": 0}))


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.embed.weight


def test_tied_parameters_stay_tied_and_count_once() -> None:
    source, target = Tied(), Tied()
    report = put(source, target)
    assert target.out.weight is target.embed.weight
    assert torch.equal(target.out.weight, source.embed.weight)
    assert report.parameters("copied") == 15
    only = put({"out.weight": torch.ones(5, 3)}, target)
    assert only.names("copied") == ["embed.weight", "out.weight"]
    assert target.embed.weight.sum() == 15


def test_tied_parameters_given_different_values_are_refused() -> None:
    target = Tied()
    before = state_of(target)
    with pytest.raises(ModelError, match=r"'out.weight': is tied to 'embed.weight'"):
        put(Tied(tied=False), target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_types_are_the_target_s_and_what_they_cannot_hold_is_refused() -> None:
    source = {"a": torch.tensor([1.5, 2.5]), "n": torch.tensor(3)}
    target = {"a": torch.zeros(2, dtype=torch.float16), "n": torch.tensor(0.0)}
    report = put(source, target)
    assert target["a"].dtype == torch.float16
    assert report.rows[0].how == "F32 as F16"
    assert report.rows[1].how == "type I64 into F32"
    with pytest.raises(CheckpointError, match="'a': has numbers too large for F16"):
        put({"a": torch.tensor([1e6, 0.0])}, target)
    assert target["a"].tolist() == [1.5, 2.5]


def test_strict_tells_everything_and_changes_nothing() -> None:
    source, target = convolutions(), convolutions()
    target[4] = nn.Linear(16, 7)
    target.append(nn.Linear(7, 2))
    given = state_of(source) | {"extra": torch.ones(1)}
    before = state_of(target)
    with pytest.raises(ModelError) as error:
        put(given, target, strict=True)
    text = str(error.value)
    for name in ("4.weight", "4.bias", "5.weight", "5.bias"):
        assert f"tensor '{name}' of the target: is" in text
    assert "tensor 'extra' of the source: isn't used" in text
    assert len(error.value.problems) == 5
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    put(source, convolutions(), strict=True)
    put(stack(2), stack(4), depth="spread", strict=True)  # the layers between were left on purpose


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="nothing of it fits the target \\(no name is in both\\)"):
        put({"a": torch.ones(2)}, {"b": torch.ones(2)})


def test_arrays_and_modules_meet() -> None:
    net = nn.Linear(2, 2)
    arrays = {"weight": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    put(arrays, net)
    assert net.weight.sum() == 4
    put(nn.Linear(2, 2), arrays)
    assert arrays["weight"].sum() != 4
    assert net.weight.requires_grad


def test_folders_are_written_tensor_by_tensor_and_never_changed(tmp_path: Path) -> None:
    source, target = stack(2) | {"big": torch.randn(40, 30)}, stack(4) | {"big": torch.randn(50, 20).bfloat16()}
    for name, tensors in (("source", source), ("target", target)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "target" / "config.json").write_text('{"num_hidden_layers": 4}')
    out = tmp_path / "out"
    options: dict[str, Any] = {"depth": "spread", "adapt": ["crop", "pad"], "show": False}
    report = itf.transplant(tmp_path / "source", tmp_path / "target", out=out, **options)
    memory = {name: value.clone() for name, value in target.items()}
    assert put(source, memory, depth="spread", adapt=["crop", "pad"]).rows == tuple(
        row for name in memory for row in report.rows if row.name == name
    )
    written = open_checkpoint(out)
    assert written.hash() == open_checkpoint(memory).hash()
    assert open_checkpoint(tmp_path / "target").hash() == open_checkpoint(target).hash()
    assert (out / "config.json").read_text() == '{"num_hidden_layers": 4}'
    with pytest.raises(CheckpointError, match="is there already"):
        itf.transplant(tmp_path / "source", tmp_path / "target", out=out, **options)
    with pytest.raises(OptionError, match="give out=FOLDER"):
        itf.transplant(tmp_path / "source", tmp_path / "target", show=False)


def test_what_is_copied_between_files_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tensors in (("source", stack(2, 300_000)), ("target", stack(4, 300_000))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    seen: list[int] = []
    block = Checkpoint.block

    def counted(self: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
        seen.append(stop - start)
        return block(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "block", counted)
    files = (tmp_path / "source.safetensors", tmp_path / "target.safetensors")
    itf.transplant(*files, depth="spread", out=tmp_path / "out", show=False)
    assert max(seen) <= BLOCK
    assert sum(seen) == 4 * 300_000
    written = {name: torch.from_numpy(open_checkpoint(tmp_path / "out").read(name)) for name in stack(4)}
    assert layers_of(written) == [0, 1, 1, 3]


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = itf.transplant(stack(2), stack(2))
    shown = capsys.readouterr().out
    assert "layers.*.weight" in shown
    assert "copied 2 tensors (6 numbers)" in shown
    assert report.caption() in str(report)


def llama(layers: int, tokens: int = 20) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": layers, "intermediate_size": 12}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=tokens, bos_token_id=1, eos_token_id=2))


def test_a_folder_of_transformers_loads_and_has_each_layer_where_it_was_sent(tmp_path: Path) -> None:
    source, target = llama(2), llama(4)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    itf.transplant(tmp_path / "source", tmp_path / "target", depth="spread", out=tmp_path / "out", show=False)
    put(source, target, depth="spread")
    loaded, told = type(target).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    for mine, theirs in ((0, 0), (2, 1)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(state[name.format(mine)], source.state_dict()[name.format(theirs)])


def test_rows_by_the_tokens_of_two_folders(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = (["<s>", "</s>", "a", "b", "c"], ["</s>", "c", "new", "<s>"])
    for side, tokens in zip(("source", "target"), words, strict=True):
        (tmp_path / side).mkdir()
        model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<s>")
        tokenizers.Tokenizer(model).save(str(tmp_path / side / "tokenizer.json"))
    source, target = llama(2, 5), llama(2, 4)
    before = target.model.embed_tokens.weight.detach().clone()
    put(source, target, vocabulary=(tmp_path / "source", tmp_path / "target"))
    rows = source.model.embed_tokens.weight
    assert torch.equal(target.model.embed_tokens.weight, torch.stack([rows[1], rows[4], before[2], rows[0]]))
    with pytest.raises(OptionError, match="no tokenizer in"):
        put(source, target, vocabulary=(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"rules": ["0.*"]}, ["rules"]),
        ({"rules": {"0.*": 3, 1: "1.*"}, "depth": 3}, ["rules['0.*']", "rules[1]", "depth"]),
        ({"depth": {"": 3, "layers": {0: "x"}}}, ["depth['']", "depth['layers']"]),
        ({"adapt": 3}, ["adapt"]),
        ({"adapt": "crp", "rules": {"9.*": "0.*"}}, ["rules['9.*']", "adapt"]),
        ({"adapt": {"0.*": 3, "4.*": "crp"}}, ["adapt['0.*']", "adapt['4.*']"]),
        ({"vocabulary": (3, {"a": 0})}, ["vocabulary: source"]),
        ({"vocabulary": ({"a": "x"}, {"a": 0})}, ["vocabulary: source"]),
    ],
)
def test_options_of_another_kind_are_told(options: dict[str, Any], places: list[str]) -> None:
    target = convolutions()
    before = state_of(target)
    with pytest.raises(OptionError) as raised:
        itf.transplant(convolutions(), target, show=False, **options)
    assert [problem.path for problem in raised.value.problems] == places
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_what_cannot_be_written_to_is_told_before_anything_is() -> None:
    source = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3), "d": torch.ones(3)}
    fixed = np.zeros(3, np.float32)
    fixed.flags.writeable = False
    with torch.inference_mode():
        inside = torch.zeros(3)
    free = torch.zeros(3)
    target = {"a": free, "b": fixed, "c": torch.zeros(1).expand(3), "d": inside}
    with pytest.raises(ModelError) as raised:
        put(source, target)
    assert len(raised.value.problems) == 3
    assert not free.any()


def test_whole_numbers_and_masks_of_another_shape_stay_the_target_s_unless_named() -> None:
    source = {"index": torch.arange(4), "weight": torch.ones(4)}
    target = {"index": torch.arange(6), "weight": torch.zeros(6)}
    report = put(source, target, adapt="pad")
    assert report.names("skipped") == ["index"]
    assert target["index"].tolist() == [0, 1, 2, 3, 4, 5]
    assert target["weight"].tolist() == [1, 1, 1, 1, 0, 0]
    assert put(source, target, adapt={"*": "pad"}).names("adapted") == ["index", "weight"]
    assert target["index"].tolist() == [0, 1, 2, 3, 0, 0]
