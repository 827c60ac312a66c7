"""`save_pretrained`, `push_to_hub` and `from_pretrained`, against a small hub of our own that the hub's client talks to."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, PyTorchModelHubMixin, constants
from safetensors.torch import load as tensors_in
from torch import nn

import interfuse as itf
from interfuse.errors import CheckpointError, MissingExtra, ModelError, OptionError
from interfuse.modules.cross_stitch import CrossStitch
from interfuse.modules.pretrained import Pretrained

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories in memory, and what was asked of it: repository -> branch -> file -> content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: dict[str, bool | str | None] = {}
        self.commits: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


def sha(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request of the hub's client."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(?:revision|tree)/([^/]+))?", path):
            files = self.files(*match.groups())
            if files is not None and "/tree/" in path:
                listed = [{"type": "file", "oid": sha({p: c}), "size": len(c), "path": p} for p, c in files.items()]
                self.send(200, json.dumps(listed).encode())
            elif files is not None:
                self.send(200, json.dumps({"id": match[1], "sha": sha(files), "siblings": []}).encode())
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path):
            files = self.files(match[1], match[2])
            if files is not None and match[3] in files:
                content = files[match[3]]
                self.send(200, content, {"X-Repo-Commit": sha(files), "ETag": f'"{sha({match[3]: content})}"'})
            elif files is not None:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.send(404, b"")

    def files(self, repo: str, revision: str | None) -> Files | None:
        """A revision's files; where there are none, that is the answer."""
        branches = self.server.repos.get(repo)
        if branches is None:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        for branch, files in branches.items():
            if (revision or "main") in (branch, sha(files)):
                return files
        self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") == "Bearer hf_no":
            self.send(403, b"{}")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = repo not in self.server.repos
            if new:
                self.server.repos[repo], self.server.private[repo] = {"main": {}}, asked.get("visibility", asked.get("private"))
            self.send(200 if new else 409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode())
        elif path == "/api/validate-yaml":
            self.send(200, json.dumps({"errors": [], "warnings": []}).encode())
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/branch/(\w+)", path):
            branches = self.server.repos[match[1]]
            new = match[2] not in branches
            branches.setdefault(match[2], dict(branches["main"]))
            self.send(200 if new else 409, b"{}")
        elif re.fullmatch(r"/api/models/\w+/\w+/preupload/\w+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            self.send(200, json.dumps({"files": modes}).encode())
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/(\w+)", path):
            self.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.send(404, b"")

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo][branch]
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.server.commits.append({"repo": repo, "branch": branch, "title": title})
        found = {"success": True, "commitOid": sha(files), "commitUrl": f"{self.server.url}/{repo}/commit/{sha(files)}"}
        self.send(200, json.dumps(found).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a cache of this test alone."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def fusion(**options: Any) -> itf.ModelFusion:
    return itf.ModelFusion({"a": network(1), "b": network(2, 6)}, head=3, example=X, **options).eval()


def ensemble() -> itf.Ensemble:
    model = itf.Ensemble([network(1), network(2)], combine="weighted").eval()
    model.calibrate((X, torch.arange(6) % 3), progress=False)
    return model


def crossed() -> CrossStitch:
    return itf.CrossStitch([network(1), network(2)], ["0"], X).eval()


MAKERS: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
    (fusion, lambda: {"a": network(7), "b": network(8, 6)}),
    (ensemble, lambda: [network(7), network(8)]),
    (crossed, crossed),
]


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text[4:].partition("\n---\n")[0])
    return found


@pytest.mark.parametrize(("make", "fresh"), MAKERS, ids=["fusion", "ensemble", "cross-stitch"])
def test_what_is_pushed_is_loaded_by_its_id(make: Any, fresh: Any, hub: Hub) -> None:
    model = make()
    address = model.push_to_hub("me/one", private=True, token="hf_yes", commit_message="The first")
    files = hub.repos["me/one"]["main"]
    assert sorted(files) == ["README.md", "interfuse.json", "model.safetensors"]
    assert address == f"{hub.url}/me/one/commit/{sha(files)}"
    assert hub.private["me/one"] in (True, "private")  # versions of the client say it differently
    assert hub.tokens == {"Bearer hf_yes"}
    assert hub.commits[0]["title"] == "The first"
    for back in (type(model).from_pretrained("me/one", models=fresh()), itf.load("me/one", fresh())):
        assert type(back) is type(model)
        assert not back.training
        assert torch.equal(back(X), model(X))
    assert not list(Path("cache").rglob("README.md"))  # what isn't needed isn't fetched


@pytest.mark.parametrize(("make", "fresh"), MAKERS, ids=["fusion", "ensemble", "cross-stitch"])
def test_a_folder_is_saved_with_its_card_and_loaded(make: Any, fresh: Any, tmp_path: Path) -> None:
    model = make()
    assert model.save_pretrained(tmp_path / "out") is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "interfuse.json", "model.safetensors"]
    back = type(model).from_pretrained(tmp_path / "out", models=fresh())
    assert torch.equal(back(X), model(X))
    itf.save(model, tmp_path / "plain")
    for name in ("interfuse.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with pytest.raises(CheckpointError, match="is there already"):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", overwrite=True)
    other = itf.Ensemble if isinstance(model, itf.ModelFusion) else itf.ModelFusion
    with pytest.raises(ModelError, match=f"holds a {type(model).__name__}, not a {other.__name__}"):
        other.from_pretrained(tmp_path / "out", models=fresh())


def test_the_methods_have_the_keywords_of_the_hub_s_own_mixin() -> None:
    ours = {"from_pretrained": {"models", "head", "trust_code"}, "push_to_hub": {"backbones"}}
    for name, more in ours.items():
        theirs = inspect.signature(getattr(PyTorchModelHubMixin, name)).parameters.keys()
        left_out = {"config", "model_card_kwargs", "model_kwargs", "self"}
        assert inspect.signature(getattr(itf.ModelFusion, name)).parameters.keys() - {"self"} - more == theirs - left_out
    function, method = (inspect.signature(f).parameters for f in (itf.push_to_hub, Pretrained.push_to_hub))
    assert {k: p.default for k, p in function.items() if k != "model"} == {
        k: p.default for k, p in method.items() if k != "self"
    }


def test_saving_can_push_too(hub: Hub) -> None:
    address = fusion().save_pretrained("fused", push_to_hub=True, private=False)
    assert address == f"{hub.url}/me/fused/commit/{sha(hub.repos['me/fused']['main'])}"
    assert Path("fused/interfuse.json").is_file()
    with pytest.raises(OptionError, match="private: is an option of a push; give push_to_hub=True, too"):
        fusion().save_pretrained("more", private=True)
    assert not Path("more").exists()


def test_branches_and_revisions(hub: Hub) -> None:
    one, two = itf.Ensemble([network(1)]).eval(), itf.Ensemble([network(2)]).eval()
    one.push_to_hub("me/x")
    for _ in range(2):
        two.push_to_hub("me/x", branch="try2")
    assert [commit["branch"] for commit in hub.commits] == ["main", "try2", "try2"]
    assert torch.equal(itf.load("me/x", [network()])(X), one(X))
    for ref, options in (("me/x@try2", {}), ("me/x", {"revision": "try2"}), (f"me/x@{sha(hub.repos['me/x']['try2'])}", {})):
        assert torch.equal(itf.Ensemble.from_pretrained(ref, models=[network()], **options)(X), two(X))  # type: ignore[arg-type]
    hub.repos["me/x"]["main"] |= {"README.md": b"mine", "old.bin": b"old"}
    one.push_to_hub("me/x", ignore_patterns="README.md", delete_patterns="*.bin")
    assert hub.repos["me/x"]["main"]["README.md"] == b"mine"
    assert "old.bin" not in hub.repos["me/x"]["main"]


def test_a_pull_request_is_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: asked.update(options) or "address")
    assert ensemble().push_to_hub("me/x", create_pr=True, allow_patterns=["*.json"]) == "address"
    assert (asked["create_pr"], asked["revision"], asked["allow_patterns"]) == (True, None, ["*.json"])
    with pytest.raises(OptionError, match="branch: got 'dev' for a pull request; one or the other") as caught:
        ensemble().push_to_hub("a/b/c", create_pr=True, branch="dev")
    assert [problem.path for problem in caught.value.problems] == ["repo_id", "branch"]


def test_without_a_network_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ensemble()
    model.push_to_hub("me/x")
    with pytest.raises(CheckpointError, match="me/x: is no file or folder here, nor in the hub's cache"):
        itf.Ensemble.from_pretrained("me/x", models=[network(), network()], local_files_only=True)
    itf.Ensemble.from_pretrained("me/x", models=[network(), network()], cache_dir="elsewhere")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for only in (False, True):
        networks = [network(), network()]
        back = itf.Ensemble.from_pretrained("me/x", models=networks, cache_dir="elsewhere", local_files_only=only)
        assert torch.equal(back(X), model(X))
    with pytest.raises(CheckpointError, match="me/x: is no file or folder here, nor in the hub's cache"):
        itf.load("me/x", [network(), network()])


def test_what_can_t_be_had_or_pushed_is_said(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"me/lost: .* no model on the hub that you may read; .*HF_TOKEN"):
        itf.load("me/lost")
    ensemble().push_to_hub("me/x")
    with pytest.raises(CheckpointError, match="me/x@nope: has no such revision on the hub"):
        itf.load("me/x@nope")
    with pytest.raises(ModelError, match=r"models\['Sequential'\]: missing"):
        itf.load("me/x")
    with pytest.raises(CheckpointError, match=r"me/x: the hub doesn't let you write there \(403\); set HF_TOKEN"):
        ensemble().push_to_hub("me/x", token="hf_no")
    with pytest.raises(OptionError, match="repo_id: got 'a/b/c'; owner/name"):
        ensemble().push_to_hub("a/b/c")
    with pytest.raises(ModelError, match="its widths aren't known yet"):
        itf.ModelFusion([network()], head=3).push_to_hub("me/new")
    assert "me/new" not in hub.repos


def test_the_card_says_how_to_load_the_model_and_the_code_does(hub: Hub) -> None:
    model = fusion(dropout=0.25)
    model.push_to_hub("me/one")
    card = hub.repos["me/one"]["main"]["README.md"].decode()
    assert header(card) == {"library_name": "interfuse", "tags": ["merge", "interfuse"]}
    assert "# Attention fusion of a and b\n" in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["fusion"], recipe["head"], recipe["parameters"]["dropout"]) == ("attention", 3, 0.25)
    code = card.partition("```python\n")[2].partition("```")[0]
    assert '"a": ...,  # a torch.nn.modules.container.Sequential' in code
    names: dict[str, Any] = {"network": network}
    exec(code.replace('"a": ...', '"a": network(7)').replace('"b": ...', '"b": network(8, 6)'), names)
    assert torch.equal(names["model"](X), model(X))
    crossed().push_to_hub("me/two")
    code = hub.repos["me/two"]["main"]["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    names = {"crossed": crossed}
    exec(code.replace("network = ...", "network = crossed()"), names)
    assert torch.equal(names["model"](X), crossed()(X))


def bert(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()


def test_folders_of_this_machine_are_stored_and_not_named(hub: Hub, tmp_path: Path) -> None:
    bert(1).save_pretrained("text")
    Path("text/README.md").write_text("---\nlicense: mit\n---\n")
    words = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]])}
    model = itf.Ensemble({"text": "text", "own": bert(2)}).eval()
    model.push_to_hub("me/words")
    files = hub.repos["me/words"]["main"]
    assert str(tmp_path) not in (files["interfuse.json"] + files["README.md"]).decode()
    assert {name.split(".")[1] for name in tensors_in(files["model.safetensors"])} == {"0", "1"}
    back = itf.load("me/words", {"text": bert(3), "own": bert(4)})
    assert torch.equal(back(words), model(words))


def test_members_of_the_hub_stay_references_and_one_network_is_pushed_as_transformers_does(hub: Hub) -> None:
    itf.push_to_hub(bert(1), "me/bert")
    files = hub.repos["me/bert"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert 'BertForSequenceClassification.from_pretrained("me/bert")' in files["README.md"].decode()
    assert header(files["README.md"].decode())["library_name"] == "transformers"
    words = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]])}
    model = itf.ModelFusion({"text": "me/bert"}, head=3, example=words).eval()
    model.push_to_hub("me/small")
    card = header(hub.repos["me/small"]["main"]["README.md"].decode())
    assert card["base_model"] == ["me/bert"]
    assert not [name for name in tensors_in(hub.repos["me/small"]["main"]["model.safetensors"]) if name.startswith("backbones")]
    assert torch.equal(itf.load("me/small")(words), model(words))
    model.push_to_hub("me/large", backbones="value")
    assert [name for name in tensors_in(hub.repos["me/large"]["main"]["model.safetensors"]) if name.startswith("backbones")]


def test_no_code_from_a_hub_is_run_unless_it_is_trusted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mynet.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(4, 3)\n")
    monkeypatch.syspath_prepend(".")
    itf.Ensemble({"a": nn.Linear(4, 3)}).push_to_hub("me/x")
    files = hub.repos["me/x"]["main"]
    about = json.loads(files["interfuse.json"])
    about["members"][0]["reference"] = "python:mynet:build"
    files |= {"interfuse.json": json.dumps(about).encode(), "mynet.py": b"raise SystemExit", "a.pt": b"pickle"}
    with pytest.raises(ModelError, match=r"python:mynet:build: this runs code; give --trust-code"):
        itf.load("me/x")
    assert not [path for kind in ("*.py", "*.pt") for path in Path("cache").rglob(kind)]
    assert itf.Ensemble.from_pretrained("me/x", trust_code=True)(X).shape == (6, 3)


def test_without_the_hub_s_client_the_way_out_is_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'interfuse\[hub\]'"):
        ensemble().push_to_hub("me/x")
    with pytest.raises(CheckpointError, match=r"me/x: .*pip install 'interfuse\[hub\]'"):
        itf.load("me/x")
