"""The configs in examples/tasks, run whole on tiny data with tiny models of the real classes."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lever_data import connect
from lever_data.options import Section
from lever_train.flow.run import run
from lever_train.options.pipeline import load_pipeline
from tests.cases import long_except
from tests.encoders import QUESTIONS, tiny_clip
from tests.tiny_lm import save_tiny_lm
from tests.tiny_vlm import save_tiny_vlm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "tasks"
METRICS = {"labels": "label", "qa": "squad-f1", "captions": "cider-d", "vqa": "vqa-accuracy"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    words = [w for f in EXAMPLES.glob("*.jsonl") for w in re.findall(r"\w+", f.read_text())]
    tiny_clip(folder / "clip", [*words, *QUESTIONS])
    save_tiny_lm(folder / "lm")
    save_tiny_vlm(folder / "vlm")
    return folder


def write_pictures(folder: Path, name: str) -> None:
    """Tiny files as the example names them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("eval", 4)):
        rows: list[dict[str, object]] = []
        for number in range(count):
            data = io.BytesIO()
            pixels = rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data, "PNG")
            said = f"a picture of thing {number % 3}"
            row: dict[str, object] = {"image": {"bytes": data.getvalue(), "path": None}}
            if name == "captions":
                rows.append(row | {"captions": [said, f"thing {number % 3}"]})
            else:
                rows.append(row | {"question": "what is it", "answers": [said] * 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}_{split}.parquet")


@pytest.mark.long
@pytest.mark.parametrize("name", long_except(METRICS, "captions"))
def test_an_example_runs_from_its_data_to_a_scoreboard(
    name: str, tmp_path: Path, models: Path
) -> None:
    for file in EXAMPLES.glob(f"{name}*"):
        shutil.copy(file, tmp_path)
    if not (tmp_path / f"{name}_train.jsonl").exists():
        write_pictures(tmp_path, name)
    config = load_pipeline(tmp_path / f"{name}.toml")
    model = "lm" if config.answerer.api == "completions" else "vlm"

    def replaced(section: Section, **changes: object) -> Section:
        return section.model_copy(update=changes)

    # nobody trained the model: as good as all its answers are wrong, and all groups tied
    run_options = replaced(config.train.run, tied_groups="keep")

    config = config.model_copy(
        update={
            "answerer": replaced(
                config.answerer,
                spec=f"transformers:{models / model}",
                max_new_tokens=2,
                num_beams=1,
                log_probs=False,
            ),
            "train": replaced(config.train, run=run_options),
            "embed": replaced(config.embed, encoder=str(models / "clip")),
        }
    )
    run(config, print, lambda *_: None)
    assert (tmp_path / f"{name}-out" / "eval.html").exists()
    with connect(tmp_path / f"{name}-store") as con:
        found = con.execute("select distinct metric from all_candidates").fetchall()
        rows = con.execute("select count(*) from evaluations").fetchall()[0][0]
    assert [metric.startswith(METRICS[name]) for (metric,) in found] == [True]
    assert rows > 0
