"""Models that aren't on this machine: a hub and a web server of our own count what is asked of them, byte by byte."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from interfuse import extract_lora, moe
from interfuse.checkpoints.remote.urls import cache_folder
from interfuse.checkpoints.source import open_checkpoint
from interfuse.engine.merge import merge
from interfuse.engine.opening import at_commit, commits_of, open_references
from interfuse.errors import CheckpointError
from interfuse.pipeline import run
from interfuse.pipeline.verifying import verify
from interfuse.recipe.references import Reference

COMMIT = "c0ffee" + "0" * 34
LATER = "decade" + "0" * 34
LARGE = 500_000  # elements


def write_model(folder: Path, seed: int, layers: int = 2, *, shards: bool = False) -> Path:
    """A model of a few megabytes, with the files that come along."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    state = {f"layers.{i}.w": draw.normal(size=(LARGE // 100, 100)).astype(np.float32) for i in range(layers)}
    if shards:
        names = {name: f"model-{i + 1:05d}-of-{layers:05d}.safetensors" for i, name in enumerate(state)}
        for name, file in names.items():
            save_file({name: state[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text(json.dumps({"seed": seed}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


class Server(ThreadingHTTPServer):
    """Serves a folder of models as a hub does, and as a plain web server under /files/; `asked` is what went out."""

    def __init__(self, folder: Path, *, ranges: bool = True, listing: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.listing = folder, ranges, listing
        self.asked: list[tuple[str, str, int]] = []
        self.moved: dict[str, Path] = {}  # repositories with a later commit, and where what they had before is
        self.url = f"http://127.0.0.1:{self.server_port}"

    def sent(self, end: str = "") -> int:
        """Bytes of bodies that were sent, of files whose name ends so."""
        return sum(size for _, path, size in self.asked if path.endswith(end))

    def move(self, repo: str) -> Path:
        """Give the repository a later commit, whose files are yet to be written in the folder that is given."""
        folder = self.folder / repo
        self.moved[repo] = folder.rename(self.folder / "before" / repo.replace("/", "-"))
        return folder

    def at(self, repo: str, revision: str | None) -> tuple[Path, str]:
        """The folder of a revision, and its commit."""
        now = LATER if repo in self.moved else COMMIT
        if revision == COMMIT != now:
            return self.moved[repo], COMMIT
        return self.folder / repo, now


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.about(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            folder, commit = self.server.at(match[1], match[2])
            self.file(folder / match[3], {"X-Repo-Commit": commit})
        else:
            self.file(self.server.folder / path.removeprefix("/files/"), {})

    def about(self, repo: str, revision: str | None) -> None:
        folder, commit = self.server.at(repo, revision)
        if repo == "org/gated":
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir():
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", commit):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files]
            self.send(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(), {})

    def file(self, path: Path, headers: dict[str, str]) -> None:
        if path.is_dir() and self.server.listing:
            links = "".join(f'<a href="{p.name}{"/" if p.is_dir() else ""}">x</a>' for p in path.iterdir())
            self.send(200, links.encode(), {"Content-Type": "text/html"})
            return
        if not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = headers | {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            self.send(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
        else:
            self.send(200, content, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        sent = 0
        if self.command == "GET":
            try:
                for start in range(0, len(body), 2**16):
                    sent += self.wfile.write(body[start : start + 2**16])
            except (BrokenPipeError, ConnectionResetError):
                pass  # a client that has read enough hangs up
        self.server.asked.append((self.command, self.path.partition("?")[0], sent))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, which the hub's client takes for the hub, and caches of this test alone."""
    for name in ("org", "before"):
        (tmp_path / "served" / name).mkdir(parents=True)
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def recipe(*models: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models]}


def mean(*folders: Path) -> dict[str, np.ndarray]:
    states = [open_checkpoint(folder) for folder in folders]
    return {name: np.asarray(np.mean([state.read(name) for state in states], 0)) for name in states[0].specs}


def same(out: Path, folders: list[Path]) -> bool:
    wanted = mean(*folders)
    got = load_file(out / "model.safetensors")
    return got.keys() == wanted.keys() and all(np.allclose(got[name], wanted[name], atol=1e-6) for name in got)


# --- the hub ---


@pytest.mark.parametrize("shards", [False, True])
def test_a_plan_of_hub_models_reads_headers_and_a_run_fetches_them_once(served: Server, shards: bool) -> None:
    folders = [write_model(served.folder / "org" / name, i, shards=shards) for i, name in enumerate("ab")]
    whole = sum(p.stat().st_size for f in folders for p in f.glob("*.safetensors"))
    record = run(recipe("org/a", "org/b@main"), "out", dry_run=True, progress=False)
    assert "org/b@main" in json.dumps(record.plan)
    assert record.here is not None
    assert whole < record.here["fetch"]["needs"] < whole + 1000
    assert f" in {5 if shards else 3} files are fetched first\n" in record.text()
    assert 0 < served.sent(".safetensors") <= 2 * (2 if shards else 1) * 2**16 < whole / 10
    assert not list(Path("hub").rglob("*.safetensors"))
    assert not Path("out").exists()

    served.asked.clear()
    run(recipe("org/a", "org/b@main"), "out", progress=False)
    assert whole <= served.sent(".safetensors") <= whole + 8 * 2**16
    assert same(Path("out"), folders)
    assert (Path("out") / "tokenizer.json").read_text() == '{"seed": 0}'
    sources = json.loads(Path("out/interfuse.json").read_text())["sources"]
    assert [source["model"] for source in sources] == ["org/a", "org/b@main"]
    assert [source["origins"] for source in sources] == [[f"org/a@{COMMIT}"], [f"org/b@{COMMIT}"]]

    found = verify("out", again=True)
    assert found.good, found.checks
    served.asked.clear()
    run(recipe("org/a", "org/b@main"), "again", progress=False)
    assert served.sent(".safetensors") == 0
    assert (Path("again") / "model.safetensors").read_bytes() == (Path("out") / "model.safetensors").read_bytes()


def drop_the_cache() -> None:
    shutil.rmtree("hub")


def stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("away", [False, True])
def test_verify_reads_the_commits_that_were_merged(served: Server, monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    """The branches have moved on since: to other values, and to another architecture."""
    for i, name in enumerate("abc"):
        write_model(served.folder / "org" / name, i)
    first = recipe("org/a", "org/b@main") | {"name": "first"}
    run([first, recipe("first", "org/c")], "out", progress=False)
    write_model(served.move("org/a"), 5)
    write_model(served.move("org/b"), 6, layers=3)
    run(recipe("org/a", "org/c", f"org/a@{COMMIT}"), "both", progress=False)
    write_model(served.move("org/c"), 7)
    if away:
        stay_away(monkeypatch)
    else:
        drop_the_cache()
    for folder in ("out", "both"):
        found = verify(folder, again=True, progress=False)
        assert found.good, found.text()
        assert {check.what for check in found.checks} == {"tensors", "files", "recipe", "inputs", "again"}
        assert all(check.good for check in found.checks)
    assert away or not served.sent(f"b/resolve/{LATER}/model.safetensors")
    if not away:
        drop_the_cache()
        shutil.rmtree(served.moved["org/c"])
        assert [c.name for c in verify("out", progress=False).checks if c.good is None] == ["org/c", "first"]


def write_words(folder: Path, words: str) -> Path:
    """A model whose embedding has a row for each word, or only its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words.split())}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(vocabulary)}))
    return folder


def test_verify_reads_the_commit_of_a_tokenizer_that_was_taken(served: Server) -> None:
    for seed, name in enumerate("pq"):
        folder = write_words(served.folder / "org" / name, "a b c d")
        rows = np.random.default_rng(seed).standard_normal((4, 8), np.float32)
        save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    write_words(served.folder / "org" / "words", "a d b c")
    run(recipe("org/p", "org/q") | {"tokenizer_source": "org/words"}, "out", progress=False)
    record = json.loads(Path("out/interfuse.json").read_text())
    assert record["tokenizer_origins"] == [f"org/words@{COMMIT}"]
    rows = mean(served.folder / "org" / "p", served.folder / "org" / "q")["model.embed_tokens.weight"]
    got = load_file("out/model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_allclose(got, rows[[0, 3, 1, 2]], atol=1e-6)
    write_words(served.move("org/words"), "a c d b")
    write_words(served.move("org/p"), "d c b a")
    found = verify("out", again=True, progress=False)
    assert found.good, found.text()


def write_decoder(folder: Path, seed: int) -> Path:
    """A small llama without a tokenizer."""
    folder.mkdir(parents=True)
    random, head = np.random.default_rng(seed), "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {f"{head}self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{head}mlp.{part}_proj.weight": (12, 8) for part in ("gate", "up")} | {f"{head}mlp.down_proj.weight": (8, 12)}
    shapes |= {f"{head}{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    shapes |= {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    save_file({name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}
    config |= {"intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 10, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_verify_reads_the_commits_of_a_mixture(served: Server) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_decoder(served.folder / "org" / name, seed)
    experts = [{"source_model": "org/a"}, {"source_model": "org/b"}]
    moe({"base_model": "org/base", "experts": experts, "gate_mode": "random"}, "out", seed=3)
    for seed, name in enumerate(("base", "a", "b")):
        write_decoder(served.move(f"org/{name}"), 5 + seed)
    found = verify("out", again=True, progress=False)
    assert found.good, found.text()
    assert sum(check.what == "inputs" and bool(check.good) for check in found.checks) == 3


def test_verify_reads_the_commits_that_an_adapter_was_extracted_from(served: Server) -> None:
    for seed, name in enumerate(("base", "tuned")):
        write_decoder(served.folder / "org" / name, seed)
    extract_lora("org/tuned", "org/base@main", "out", rank=2)
    for seed, name in enumerate(("base", "tuned")):
        write_decoder(served.move(f"org/{name}"), 5 + seed)
    found = verify("out", again=True, progress=False)
    assert found.good, found.text()
    assert [check.good for check in found.checks if check.what == "inputs"] == [True, True]


def test_commits_go_to_what_a_recipe_calls_them() -> None:
    base = {"model": "org/a+org/l", "origins": ["org/a@1", "org/l@2"]}
    asked = [Reference("org/a", None, "org/l", "v1"), Reference("/here")]
    assert commits_of([base, {"model": "/here"}], asked) == {("org/a", None): "1", ("org/l", "v1"): "2"}
    pinned = at_commit(asked[0], {("org/a", None): "1", ("org/l", "v1"): "2"})
    assert pinned == Reference("org/a", "1", "org/l", "2")
    assert at_commit(asked[1], {("/here", "x"): "1"}) == asked[1]
    several = [Reference("org/a"), Reference("org/a", "main"), Reference("org/a", "v2")]
    assert commits_of([base], several) == {("org/a", None): "1", ("org/a", "main"): "1", ("org/a", "v2"): "1"}
    assert not commits_of([{"model": "x", "origins": ["org/a@1", "org/a@2"]}], several)
    assert not commits_of([{"model": "x", "origins": ["https://me@host/a"]}], [Reference("https://me@host/a")])


def test_a_pipeline_on_the_hub_is_merged_part_by_part(served: Server) -> None:
    for i, name in enumerate("ab"):
        folder = served.folder / "org" / name
        write_model(folder / "unet", i)
        (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "U"], "scheduler": ["diffusers", "S"]}))
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    run(recipe("org/a", "org/b"), "out", progress=False)
    wanted = mean(*(served.folder / "org" / name / "unet" for name in "ab"))
    got = load_file("out/unet/model.safetensors")
    assert all(np.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)
    assert Path("out/scheduler/scheduler_config.json").is_file()
    assert Path("out/model_index.json").is_file()


def test_a_plan_with_a_problem_fetches_nothing(served: Server) -> None:
    write_model(served.folder / "org" / "a", 0)
    write_model(served.folder / "org" / "deep", 1, layers=3)
    with pytest.raises(CheckpointError, match=r"org/deep.*has 3 layers"):
        run(recipe("org/a", "org/deep"), "out", progress=False)
    assert served.sent(".safetensors") <= 2 * 2**16
    assert not list(Path("hub").rglob("*.safetensors"))
    assert not Path("out").exists()


def test_only_the_files_that_are_read_are_fetched(served: Server) -> None:
    write_model(served.folder / "org" / "a", 0, layers=4, shards=True)
    slices = [{"sources": [{"model": "org/a", "layer_range": [1, 3]}]}]
    run({"merge_method": "passthrough", "slices": slices}, "out", progress=False)
    fetched = sorted(p.name for p in Path("hub").rglob("*.safetensors"))
    assert fetched == ["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"]
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 2


def test_every_reference_that_can_t_be_opened_is_named_with_the_way_out(served: Server) -> None:
    write_model(served.folder / "org" / "a", 0)
    with pytest.raises(CheckpointError) as caught:
        run(recipe("org/a@nope", "org/lost", "org/gated", "bad--id@x", f"{served.url}/files/gone"), "out", progress=False)
    assert [problem.path for problem in caught.value.problems] == [f"models[{i}].model" for i in range(5)]
    parts = [problem.wrong.partition(": ") for problem in caught.value.problems]
    allowed = [problem.allowed for problem in caught.value.problems]
    found = {name: (wrong, out) for (name, _, wrong), out in zip(parts, allowed, strict=True)}
    assert found["org/a@nope"] == ("has no such revision on the hub", "give a branch, tag or commit that it has")
    assert "no model on the hub that you may read" in found["org/lost"][0]
    assert "HF_TOKEN" in found["org/lost"][1]
    assert found["org/gated"][0] == "is gated on the hub"
    assert "HF_TOKEN" in found["org/gated"][1]
    assert "can't be a hub id" in found["bad--id@x"][0]
    assert f"{served.url}/files/gone" in found
    assert len(found) == 5


def test_without_a_network_the_cache_is_used(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_model(served.folder / "org" / name, i) for i, name in enumerate("ab")]
    run(recipe("org/a", "org/b"), "out", progress=False)
    write_model(served.folder / "org" / "c", 3)
    run(recipe("org/a", "org/c"), "dry", dry_run=True, progress=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    run(recipe("org/a", f"org/b@{COMMIT}"), "again", progress=False)
    assert same(Path("again"), folders)
    with pytest.raises(CheckpointError) as caught:
        run(recipe("org/a", "org/c", "org/d"), "more", progress=False)
    text = str(caught.value)
    assert "org/c: the hub can't be reached, and its cache hasn't the whole model; run again with a network" in text
    assert "org/d: is no file or folder here, nor in the hub's cache, and the hub can't be reached" in text


def test_without_the_hub_s_client_the_way_out_is_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError) as caught:
        open_references([Reference("org/a"), Reference(str(tmp_path / "lost"))])
    assert "org/a: is no file or folder here, and a hub id takes huggingface_hub" in str(caught.value)
    assert "pip install 'interfuse[hub]'" in str(caught.value)
    assert "lost: no such file or folder" in str(caught.value)


def test_a_header_that_lies_is_found_before_the_file_is_fetched(served: Server) -> None:
    folder = write_model(served.folder / "org" / "a", 0)
    text = json.dumps({"layers.0.w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(2**20))
    with pytest.raises(CheckpointError, match=r"org/a/model\.safetensors: damaged: the last 1048540 bytes belong to no tensor"):
        open_references([Reference("org/a")])
    assert served.sent(".safetensors") <= 2**16


def test_adapters_on_the_hub_are_added_to_models_there(served: Server) -> None:
    folder = write_model(served.folder / "org" / "a", 0)
    lora = served.folder / "org" / "lora"
    lora.mkdir()
    down, up = np.ones((2, 100), np.float32), np.ones((LARGE // 100, 2), np.float32)
    pair = {"base_model.model.layers.0.w.lora_A.weight": down, "base_model.model.layers.0.w.lora_B.weight": up}
    save_file(pair, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    plain = {f"layers.{i}.w.weight": open_checkpoint(folder).read(f"layers.{i}.w") for i in range(2)}
    save_file(plain, folder / "model.safetensors")
    run(recipe("org/a+org/lora"), "out", dry_run=True, progress=False)
    assert not list(Path("hub").rglob("*.safetensors"))
    run(recipe("org/a+org/lora"), "out", progress=False)
    got = load_file(Path("out") / "model.safetensors")
    assert np.allclose(got["layers.0.w.weight"], plain["layers.0.w.weight"] + 2, atol=1e-5)
    assert np.array_equal(got["layers.1.w.weight"], plain["layers.1.w.weight"])


# --- URLs ---


@pytest.mark.parametrize(("ranges", "listing", "shards"), [(True, True, True), (True, False, True), (False, True, False)])
def test_folders_behind_a_web_server(served: Server, ranges: bool, listing: bool, shards: bool) -> None:
    served.ranges, served.listing = ranges, listing
    folders = [write_model(served.folder / name, i, shards=shards) for i, name in enumerate("ab")]
    urls = [f"{served.url}/files/{name}" for name in "ab"]
    run(recipe(*urls), "out", dry_run=True, progress=False)
    whole = sum(p.stat().st_size for f in folders for p in f.glob("*.safetensors"))
    if ranges:  # else as much goes out as the sockets' buffers hold until the client hangs up
        assert served.sent(".safetensors") < whole / 10
    assert not list(cache_folder().rglob("*.safetensors"))
    served.asked.clear()
    run(recipe(*urls), "out", progress=False)
    assert whole <= served.sent(".safetensors")
    assert not ranges or served.sent(".safetensors") < whole * 2
    assert same(Path("out"), folders)
    assert (Path("out") / "tokenizer.json").is_file()
    served.asked.clear()
    run(recipe(*urls), "again", progress=False)
    assert served.sent(".safetensors") == 0


def test_a_model_that_changes_behind_its_url_is_fetched_again(served: Server) -> None:
    folder = write_model(served.folder / "a", 0)
    url = f"{served.url}/files/a/model.safetensors"
    for value in (1.0, 2.0):
        save_file({"t": np.full(3, value, np.float32)}, folder / "model.safetensors")
        merge("linear", [url], out="out", overwrite=True)
        assert load_file("out/model.safetensors")["t"].tolist() == [value] * 3
    assert not Path("out/config.json").exists()  # a file comes without its neighbours


def test_any_file_system_that_fsspec_has(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    folders = [write_model(tmp_path / name, i) for i, name in enumerate("ab")]
    memory.put(str(folders[0]), "/models/a", recursive=True)
    try:
        out = merge("linear", ["memory://models/a", f"file://{folders[1]}"], out=tmp_path / "out")
    finally:
        memory.rm("/models", recursive=True)
    assert same(out, folders)
    sources = json.loads((out / "interfuse.json").read_text())["sources"]
    assert [source["model"] for source in sources] == ["memory://models/a", str(folders[1])]


def test_urls_that_lead_nowhere_are_named_together(tmp_path: Path) -> None:
    urls = ["memory://nothing/here", "nope://x/y", "http://127.0.0.1:9/a/model.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        merge("linear", urls, out=tmp_path / "out")
    places = [f"models[{i}].model" for i in range(3)]
    assert [problem.path for problem in caught.value.problems] == places
    assert all(problem.wrong.startswith(f"{url}: ") for problem, url in zip(caught.value.problems, urls, strict=True))
    assert "Protocol not known: nope" in str(caught.value)


def test_an_at_sign_in_a_url_is_no_revision() -> None:
    assert Reference.parse("https://me@host/a") == Reference("https://me@host/a")
    assert Reference.parse("s3://bucket/a+org/lora@v1") == Reference("s3://bucket/a", None, "org/lora", "v1")
