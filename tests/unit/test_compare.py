"""`compare` on small networks: the numbers are the metrics' and costs', and every view says the same."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from interfuse.errors import DataError, OptionError
from interfuse.evaluation.compare import compare
from interfuse.evaluation.comparison import Comparison
from interfuse.evaluation.metrics import bootstrap, paired_difference, score
from interfuse.modules.fused import ModelFusion


def classes(n: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that a linear layer tells apart in part."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    return torch.eye(3)[targets] + 0.7 * torch.randn(n, 3, generator=generator), targets


class Scaled(nn.Module):
    """Its inputs, weighed by class, as logits: good without training."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def pool() -> dict[str, nn.Module]:
    return {"good": Scaled(3.0, 3.0, 3.0), "poor": Scaled(1.0, 0.2, 0.1), "mixed": Scaled(2.0, 2.0, 1.0)}


def test_scores_intervals_and_differences_are_those_of_metrics() -> None:
    x, y = data = classes()
    models = pool()
    result = compare(models, data, parents=["good", "poor"], seed=4)
    assert [row.name for row in result.rows] == ["good", "poor", "mixed"]
    for name, model in models.items():
        outputs = model(x).detach()
        assert result[name].score.value == score("accuracy", outputs, y)
        assert result[name].score[1:] == bootstrap("accuracy", outputs, y, seed=4)
        assert result[name].cost.parameters == 3
        assert result[name].cost.batch == 32
    wanted = paired_difference("accuracy", models["mixed"](x), models["good"](x), y, seed=4)
    assert result["mixed"].difference == pytest.approx(wanted)
    assert (result.best_parent, result.chosen_here) == ("good", True)
    assert [row.parent for row in result.rows] == [True, True, False]
    assert result["good"].difference is None
    assert result.best().score.value == max(row.score.value for row in result.rows)
    assert "best parent on this same data" in result.caption()


def test_the_parent_can_be_named() -> None:
    result = compare(pool(), classes(), parents=["good", "poor"], best_parent="poor", bootstrap=20)
    assert (result.best_parent, result.chosen_here) == ("poor", False)
    assert result["mixed"].difference is not None
    assert result["mixed"].difference.value > 0
    assert "same data" not in result.caption()


def test_lower_is_better_for_a_loss() -> None:
    result = compare(pool(), classes(), metric="log_loss", parents=["good", "poor"], bootstrap=20)
    assert result.best().score.value == min(row.score.value for row in result.rows)
    assert result.best_parent == "good"
    column = next(column for column in result.columns() if column.title == "Log loss")
    assert column.best == {0}


def test_tasks_have_a_column_each_and_their_mean() -> None:
    tasks = {"first": classes(), "second": classes(60, seed=1)}
    result = compare(pool(), tasks, parents=["good"], bootstrap=50)
    row = result["poor"]
    assert list(row.scores) == ["first", "second"]
    assert row.score.value == pytest.approx((row.scores["first"].value + row.scores["second"].value) / 2)
    assert row.score.high - row.score.low < row.scores["second"].high - row.scores["second"].low
    assert [column.title for column in result.columns()][1:5] == ["first", "second", "Mean accuracy", "vs good"]
    assert result.examples == (90, 60)


def test_models_of_a_sequence_are_named_after_their_classes() -> None:
    result = compare([*pool().values(), nn.Linear(3, 3)], classes(), bootstrap=20)
    assert [row.name for row in result.rows] == ["Scaled", "Scaled-2", "Scaled-3", "Linear"]
    assert result.best_parent is None


def test_a_fusion_shows_its_weights_by_class() -> None:
    data = classes()
    parents = {"a": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), "b": nn.Sequential(nn.Linear(3, 3))}
    fusion = ModelFusion(parents, "attention", dim=8, head=3, example=data[0][:2])
    result = compare({**parents, "fusion": fusion}, data, parents=["a", "b"], bootstrap=20)
    weights = result["fusion"].weights["data"]
    assert weights.models == ("a", "b")
    assert weights.classes == ("0", "1", "2")
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in weights.values)
    assert not result["a"].weights
    assert result["fusion"].cost.trainable < result["fusion"].cost.parameters


def test_markdown_and_terminal_show_every_column() -> None:
    models = {"a|b_c": Scaled(3.0, 3.0, 3.0), "[red]x": Scaled(1.0, 0.2, 0.1)}
    result = compare(models, classes(), parents=["a|b_c"], bootstrap=20)
    lines = result.markdown().splitlines()
    headings = ["Model", "Accuracy", "vs a\\|b\\_c", "Parameters", "Trainable", "Size", "FLOPs/example"]
    headings += ["Latency (batch 32)", "Peak memory"]
    assert lines[0] == f"| {' | '.join(headings)} |"
    assert lines[2].startswith("| a\\|b\\_c | **")
    assert lines[3].startswith("| \\[red\\]x | 0.")
    console = Console(file=io.StringIO(), width=250)
    console.print(result)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("[red]x", "a|b_c", "12 B", "Peak memory", f"{result['a|b_c'].score.value:.4f}", "90 examples"):
        assert shown in text


def test_json_comes_back_as_it_was() -> None:
    result = compare(pool(), {"one": classes(), "two": classes(30, 2)}, parents=["good"], bootstrap=20)
    values = json.loads(result.json())
    assert values["rows"][2]["score"]["value"] == result["mixed"].score.value
    assert Comparison.from_dict(values) == result


def test_an_iterator_serves_every_model() -> None:
    x, y = classes()
    result = compare(pool(), ((x[i : i + 30], y[i : i + 30]) for i in range(0, 90, 30)), bootstrap=20)
    assert result.examples == (90,)
    assert result["mixed"].score == compare(pool(), (x, y), bootstrap=20)["mixed"].score
    assert result["mixed"].cost.batch == 30


def test_models_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compare([model], classes(), bootstrap=20, device="cpu")
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_every_problem_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        compare(
            {"a": nn.Linear(3, 3), "b": "b.pt"},  # type: ignore[dict-item]
            classes(),
            metric="acuracy",
            batch_size=0,
            confidence=95,
            parents=["aa"],
            best_parent="b",
            device="gpu7",
        )
    found = str(caught.value).splitlines()
    for line, start in zip(
        found,
        [
            "models['b']: got str; a torch module",
            "batch_size: got 0; at least 1",
            "confidence: got 95; a share in (0, 1)",
            "parents: no model is named 'aa'; did you mean 'a'?",
            "best_parent: 'b' isn't a parent",
            "device: got 'gpu7'",
            "metric: no metric is named 'acuracy'; did you mean 'accuracy'",
        ],
        strict=True,
    ):
        assert line.startswith(start)


def test_nothing_to_compare() -> None:
    with pytest.raises(OptionError, match=r"models: empty; give at least one\ndata: empty"):
        compare([], {})
    with pytest.raises(OptionError, match="parents: got 'good'; a list of names"):
        compare(pool(), classes(), parents="good")


def test_data_that_does_not_fit() -> None:
    x, y = classes()
    with pytest.raises(DataError, match=r"data\['b'\]: it has no targets"):
        compare(pool(), {"a": (x, y), "b": [x]})
    with pytest.raises(DataError, match="small: targets: class 2, but the outputs are of 2 classes"):
        compare({"small": nn.Linear(3, 2)}, (x, y))
    with pytest.raises(DataError, match="poor: targets: their order changed"):
        compare(pool(), DataLoader(TensorDataset(x, y), batch_size=30, shuffle=True))


def test_an_unknown_row() -> None:
    result = compare(pool(), classes(), bootstrap=20)
    with pytest.raises(OptionError, match="no model is named 'god'; did you mean 'good'"):
        result["god"]


def test_a_model_may_read_the_data_in_its_own_way() -> None:
    x, y = classes()
    models = {"plain": Scaled(3.0, 2.0, 1.0), "tenfold": Scaled(0.3, 0.2, 0.1)}
    table = compare(models, [(x, y)], views={"tenfold": [(10 * x, y)]}, metric="log_loss")
    assert table["plain"].score.value == pytest.approx(table["tenfold"].score.value)
    with pytest.raises(OptionError) as caught:
        compare(models, {"t": [(x, y)]}, views={"plain": [(x, y)], "none": {"t": [(x, y)]}})
    assert [(p.path, p.wrong) for p in caught.value.problems] == [
        ("views", "no model is named 'none'"),
        ("views['plain']", "has the tasks ['data']"),
    ]


def test_a_fusion_is_scored_with_each_input_missing() -> None:
    x, y = classes()
    models: dict[str, nn.Module] = {
        "sharp": Scaled(3.0, 3.0, 3.0),
        "dull": Scaled(1.0, 0.2, 0.1),
        "same": Scaled(2.0, 1.0, 1.0),
    }
    data = [({"one": x, "two": x.flip(0).flip(0)}, y)]
    reads = {"sharp": "one", "dull": "two", "same": "two"}
    fusion = ModelFusion(models, "mean", head=3, inputs=reads, missing="token", example=data[0][0]).eval()
    result = compare({"both": fusion, "other": pool()["good"]}, data, bootstrap=50, views={"other": [(x, y)]}, cost_batch=8)
    assert [row.name for row in result.rows] == ["both", "both without one", "both without two", "other"]
    assert [row.name for row in result.models] == ["both", "other"]
    for name, gone in (("both without one", "one"), ("both without two", "two")):
        with fusion.without(gone):
            outputs = fusion(data[0][0]).detach()
        assert result[name].score.value == score("accuracy", outputs, y)
        assert (result[name].whole, result[name].weights) == ("both", {})
        wanted = paired_difference("accuracy", outputs, fusion(data[0][0]).detach(), y, resamples=50)
        assert result[name].change == pytest.approx(wanted)
    assert result["both"].change is None
    assert fusion.left_out == frozenset()
    assert "| vs all inputs |" in result.markdown()
    assert 'In a row "without" an input, that is missing from every example.' in result.caption()
    assert Comparison.from_dict(json.loads(result.json())) == result
    best = result.best()
    assert best.whole is None
    assert best.score.value == max(row.score.value for row in result.models)


def test_inputs_are_taken_away_where_that_is_wanted() -> None:
    x, y = classes()
    models = {"a": Scaled(3.0, 3.0, 3.0), "b": Scaled(1.0, 0.2, 0.1)}
    plain, tokens = (ModelFusion(models, head=3, missing=way, example=x).eval() for way in ("none", "token"))
    for fusion, missing, rows in ((plain, None, 1), (plain, True, 3), (tokens, None, 3), (tokens, False, 1)):
        assert len(compare({"f": fusion}, (x, y), missing=missing, bootstrap=10).rows) == rows
    alone = ModelFusion(models, head=3, inputs={"a": "x", "b": "x"}, missing="token", example=x).eval()
    assert len(compare({"f": alone}, (x, y), bootstrap=10).rows) == 1  # they read the same: nothing is left without it
    with pytest.raises(OptionError, match=r"models\['f without a'\]: is the name of a row with an input missing"):
        compare({"f": tokens, "f without a": plain}, (x, y))


def test_a_comparison_written_before_there_were_such_rows_is_read() -> None:
    result = compare(pool(), classes(), bootstrap=10)
    values = result.to_dict()
    for row in values["rows"]:
        del row["whole"], row["change"]
    assert Comparison.from_dict(values) == result
