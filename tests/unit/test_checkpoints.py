"""Reading: every place a checkpoint can be in gives the same tensors, and a damaged file never gets further than an error."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interfuse.checkpoints.source import BLOCK, TensorSpec, open_checkpoint
from interfuse.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, generator=generator).half(),
        "brain": torch.randn(2, 3, generator=generator).bfloat16(),
        "double": torch.randn(2, generator=generator).double(),
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def put(write: Callable[[Any, Path], Any], name: str, ref: str = "") -> Callable[[Any, Path], Path]:
    """Write a state into a file of that name; the file, or else `ref`, is what is opened."""

    def put_it(state: Any, folder: Path) -> Path:
        write(state, folder / name)
        return folder / (ref or name)

    return put_it


def old_save(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


PLACES: dict[str, Callable[[Any, Path], Any]] = {
    "file": put(save_file, "x.safetensors"),
    "folder": put(save_file, "model.safetensors", "."),
    "shards": lambda state, folder: shards(state, folder, ".safetensors", save_file),
    "bin": put(torch.save, "pytorch_model.bin", "."),
    "bin_shards": lambda state, folder: shards(state, folder, ".bin", torch.save),
    "nested_pt": put(lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path), "a.pt"),
    "old_pt": put(old_save, "a.pt"),
    "mapping": lambda state, folder: state,
    "arrays": lambda state, folder: {name: tensor.numpy() for name, tensor in state.items()},
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_tensors(place: str, tmp_path: Path) -> None:
    state = tensors()
    if place == "arrays":
        state.pop("brain")
    checkpoint = open_checkpoint(PLACES[place](state, tmp_path))
    assert checkpoint.specs.keys() == state.keys()
    for name, tensor in state.items():
        got = checkpoint.read(name)
        assert got.shape == tuple(tensor.shape)
        assert got.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(block.tobytes() for block in checkpoint.blocks(name, 2)) == got.tobytes()
    assert checkpoint.hash() == open_checkpoint(state).hash()


def shards(state: dict[str, torch.Tensor], folder: Path, suffix: str, save: Callable[..., Any]) -> Path:
    names = list(state)
    where = {name: f"part-{i % 2}{suffix}" for i, name in enumerate(names)}
    for shard in ("part-0", "part-1"):
        save({name: state[name] for name in names if where[name] == shard + suffix}, folder / f"{shard}{suffix}")
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_specs_tell_types_and_shapes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "m.safetensors")
    specs = open_checkpoint(tmp_path / "m.safetensors").specs
    assert specs["brain"] == TensorSpec("BF16", (2, 3))
    assert (specs["brain"].count, specs["brain"].nbytes, specs["brain"].storage) == (6, 12, np.dtype("uint16"))
    assert specs["step"] == TensorSpec("I64", ())
    assert str(specs["w"]) == "F32[3, 5]"


def test_a_module_is_read_without_its_extra_state() -> None:
    class Extra(torch.nn.Linear):
        def get_extra_state(self) -> str:
            return "text"

    assert list(open_checkpoint(Extra(2, 2)).specs) == ["weight", "bias"]


def test_the_hash_sees_values_names_types_and_shapes() -> None:
    one = {"a": np.zeros((2, 3), np.float32)}
    others: list[dict[str, np.ndarray]] = [
        {"a": np.array([[0, 0, 0], [0, 0, 1e-30]], np.float32)},
        {"b": one["a"]},
        {"a": one["a"].view(np.int32)},
        {"a": one["a"].reshape(3, 2)},
    ]
    hashes = [open_checkpoint(state).hash() for state in [one, *others]]
    assert len(set(hashes)) == 5


def test_transposed_memory_is_read_in_row_major_order() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    for state in ({"t": tensor}, {"t": tensor.numpy()}):
        checkpoint = open_checkpoint(state)
        assert checkpoint.read("t").tolist() == tensor.tolist()
        assert next(checkpoint.blocks("t")).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_file_is_read_in_blocks(tmp_path: Path) -> None:
    save_file({"t": torch.arange(BLOCK * 2 + 3, dtype=torch.int32)}, tmp_path / "m.safetensors")
    blocks = open_checkpoint(tmp_path / "m.safetensors").blocks("t")
    first = next(blocks)
    assert first[0] == 0
    second = next(blocks)
    assert second[0] == BLOCK
    assert next(blocks).tolist() == [2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes long"),
        (b"\x01\x02", "2 bytes long"),
        (raw({}, length=1000), "the header should be 1000 bytes, the file has 10"),
        (raw({}, length=2**63), "the header should be 9223372036854775808 bytes"),
        (raw(b"{nope"), "isn't JSON"),
        (raw(b"\xff\xfe{}"), "isn't JSON (UnicodeDecodeError)"),
        (raw(b"[" * 100_000), "isn't JSON (RecursionError)"),
        (raw(b"[1]"), "the header is a list"),
        (raw({"t": 3}, b""), "tensor 't': its entry must have"),
        (raw({"t": entry(dtype="F33")}, b"1234"), "tensor 't': unknown dtype 'F33'"),
        (raw({"t": entry(dtype=["F32"])}, b"1234"), "tensor 't': unknown dtype ['F32']"),
        (raw({"t": entry(shape=[-1])}, b"1234"), "tensor 't': bad shape [-1]"),
        (raw({"t": entry(shape=[True])}, b"1234"), "tensor 't': bad shape [True]"),
        (raw({"t": entry(shape=[2**63])}, b"1234"), "tensor 't': bad shape [9223372036854775808]"),
        (raw({"t": entry(shape=[1] * 65)}, b"1234"), "tensor 't': bad shape [1, 1"),
        (raw({"t": entry(shape="1")}, b"1234"), "tensor 't': bad shape '1'"),
        (raw({"t": entry(offsets=[4, 0])}, b"1234"), "tensor 't': bad data_offsets [4, 0]"),
        (raw({"t": entry(offsets=[0])}, b"1234"), "tensor 't': bad data_offsets [0]"),
        (raw({"t": entry(shape=[2], offsets=[0, 8])}, b"1234"), "tensor 't': its data ends at byte 8, the file has 4"),
        (raw({"t": entry(shape=[2])}, b"1234"), "tensor 't': F32[2] takes 8 bytes, data_offsets give 4"),
        (raw({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"), "tensor 'b' overlaps 'a'"),
        (raw({"a": entry(offsets=[2, 6])}, b"123456"), "2 bytes before tensor 'a' belong to no tensor"),
        (raw({"a": entry()}, b"123456"), "the last 2 bytes belong to no tensor"),
        (
            raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
            "'a' is there more than once",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_every_bad_tensor_of_a_header_is_listed(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(raw({"a": entry(dtype="X"), "b": entry(shape=[9])}, b"1234"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "bad.safetensors")
    assert len(caught.value.problems) == 2


def test_a_file_truncated_at_any_byte_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(path)


def test_a_file_that_shrinks_after_opening_is_an_error_when_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(300)}, path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 400)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        list(checkpoint.blocks("a"))
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read: No such file"):
        list(checkpoint.blocks("a"))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "C:\\x.bin", "", "."])
def test_an_index_can_name_only_files_beside_it(shard: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=re.escape(f"tensor 'a' lies in {shard!r}")):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_a_weight_map_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="isn't an index with a weight_map"):
        open_checkpoint(tmp_path)


def test_what_an_index_has_wrong_for_many_tensors_is_said_in_few_lines(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.ones(1) for i in range(3)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"layers.{i}": "../x.safetensors" for i in range(100)}}))
    with pytest.raises(CheckpointError, match=r"'layers.0' lies in '../x.*and 97 more such tensors; a shard is") as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.problems) == 1
    index.write_text(json.dumps({"weight_map": {f"layers.{i}": "x.safetensors" for i in range(100)}}))
    with pytest.raises(CheckpointError, match=r"100 tensors are not in 'x.safetensors': 'layers.0', .* and 95 more") as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.problems) == 4


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "extra": torch.ones(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"'b' is not in 'x.safetensors'(.|\n)*'extra' is in a shard but not in the index"
    ):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'y\.safetensors' isn't there"):
        open_checkpoint(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"a": Bad()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Bad()}))
    refusals = {"pytorch_model.bin": "holds posix.mkdir, and reading that would run code", "plain.pt": "no file of torch's"}
    for name, said in refusals.items():
        with pytest.raises(CheckpointError, match=f"can't be read as plain weights: it.*{said}") as raised:
            open_checkpoint(tmp_path / name)
        assert "weights_only" not in str(raised.value)  # torch's way out is to run what is in the file
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_damaged_torch_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: can't be read as plain weights"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_torch_file_must_hold_tensors(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        open_checkpoint(tmp_path / "list.pt")
    torch.save({"a": torch.ones(1), "n": 3}, tmp_path / "mixed.pt")
    with pytest.raises(CheckpointError, match="tensor 'n' is a int, not a tensor"):
        open_checkpoint(tmp_path / "mixed.pt")


def test_a_folder_must_say_which_file_it_means(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file of weights"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert list(open_checkpoint(tmp_path).specs) == ["a"]
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files of weights, none named model: x.safetensors, y.safetensors"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for ref, message in [
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "a.txt", "'a.txt' isn't a file of weights"),
        (3, "can't read weights from a int"),
        ({"a": np.array(["x"])}, "tensor 'a' has dtype <U1"),
        ({"a": "x"}, "tensor 'a' is a str, not a tensor"),
        (torch.nn.LazyLinear(3), "tensor 'weight' has no data yet"),
        (torch.nn.Linear(2, 2, device="meta"), "tensor 'weight' has no data yet"),
        ({"a": torch.eye(2).to_sparse()}, "layout torch.sparse_coo"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            open_checkpoint(ref)  # type: ignore[arg-type]


def test_reading_safetensors_needs_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from interfuse.checkpoints.source import open_checkpoint;"
        f"c = open_checkpoint({str(tmp_path)!r}); c.hash(); assert c.read('a').sum() == 3; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
