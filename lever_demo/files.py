"""The embedded world as files, in the formats the legacy system leaves behind.

In goes a :class:`World`; out come, in one folder, RL data JSON of the newest generation, InfoScore
beam data, questions and annotations in the official VQA format, embeddings and pools. The same
world gives the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_data.store.files import write_atomic
from lever_demo.answers import DemoAnswerer
from lever_demo.proposals import Draw, Scores, propose, score
from lever_demo.world import ANNOTATORS, Items, World

DATASET = "demo"
QUESTION_ID_BASE = {"train": 100_000, "val": 900_000}
BEAM_SHARE = 0.25  # of the train queries have InfoScore data, as in the legacy system


@dataclass(frozen=True)
class WorldFiles:
    """Where the files of a world are."""

    folder: Path

    @property
    def rl_data(self) -> Path:
        """RL data of every train query."""
        return self.folder / "rl_data_MixSampler_DemoVLM.json"

    @property
    def beam_data(self) -> Path:
        """InfoScore beams of a quarter of the train queries, for SFT."""
        return self.folder / "beam_MixSampler_DemoVLM.json"

    def questions(self, split: str) -> Path:
        """Questions of ``train`` or ``val``."""
        return self.folder / f"{split}_questions.json"

    def annotations(self, split: str) -> Path:
        """Ten answers a question."""
        return self.folder / f"{split}_annotations.json"

    def embeddings(self, split: str) -> Path:
        """What the selector sees: float32 [n, 96], row = index of the question."""
        return self.folder / f"{split}_embeddings.npy"

    def vision(self, split: str) -> Path:
        """What the answerer sees: float32 [n, 32]."""
        return self.folder / f"{split}_vision.npy"

    def pool(self, split: str) -> Path:
        """int16 [n, K]: the train items a query may be shown, most similar first."""
        return self.folder / f"{split}_pool.npy"


def write_world(world: World, folder: Path) -> WorldFiles:
    """Write all files of a world into ``folder``, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = WorldFiles(folder)
    draws = propose(world)
    _write_json(files.rl_data, rl_data(world, draws, score(world, draws)))
    _write_json(files.beam_data, beam_data(world))
    for split, items, pool in (
        ("train", world.train, world.train_pool),
        ("val", world.held_out, world.held_out_pool),
    ):
        _write_json(files.questions(split), _questions(split, items))
        _write_json(files.annotations(split), _annotations(split, items))
        np.save(files.embeddings(split), items.embedding)
        np.save(files.vision(split), items.vision)
        np.save(files.pool(split), pool.astype(np.int16))
    return files


def rl_data(world: World, draws: list[Draw], scores: Scores) -> dict[str, Any]:
    """RL data JSON, third generation. A pointer drawn twice keeps its first source."""
    data: dict[str, Any] = {
        "_meta": {
            "created_at": "2026-01-01",
            "vqa_model": "demo-nearest-demonstration",
            "task_gen_args": {"max_new_tokens": 5, "num_beams": 3, "length_penalty": 0.0},
            "strict_eval": False,
        }
    }
    for query in range(len(world.train)):
        seen: set[tuple[int, ...]] = set()
        found = []
        for ordinal, draw in enumerate(draws):
            positions = tuple(int(p) for p in draw.positions[query])
            if positions not in seen:
                seen.add(positions)
                found.append(_candidate(world, draw, scores, (query, ordinal)))
        data[str(query)] = {
            "query": _query("train", world.train, query),
            "candidate_pool_indices": world.train_pool[query].tolist(),
            "pointer_candidates": found,
        }
    return data


def beam_data(world: World) -> dict[str, Any]:
    """InfoScore beams: the 5 best of the 8 nearest demonstrations by gain in log-probability.

    The gain is log P(the commonest annotation | demonstrations) − log P(it | none), in nats.
    """
    answerer = DemoAnswerer(world.train)
    alone = answerer.shares.mean(0)
    data = {}
    for query in range(int(len(world.train) * BEAM_SHARE)):
        near = world.train_pool[query, :8]
        pairs = np.array([(a, b) for a in near for b in near if a != b])
        likely = answerer.distribution(world.train.vision[query : query + 1], pairs[None])[0]
        word = answerer.words.index(_commonest(world.train.answers[query]))
        gain = np.log(likely[:, word] + 1e-6) - np.log(alone[word] + 1e-6)
        best = np.argsort(-np.round(gain, 6), kind="stable")[:5]
        data[str(query)] = {
            "id_list": [[*pairs[i].tolist(), query] for i in best],
            "score_list": [round(float(gain[i]), 6) for i in best],
        }
    return data


def _candidate(world: World, draw: Draw, scores: Scores, at: tuple[int, int]) -> dict[str, Any]:
    query, _ = at
    positions = draw.positions[query]
    accuracy = float(scores.accuracy[at])
    return {
        "pointer": world.train_pool[query, positions].tolist(),
        "pointer_pos": positions.tolist(),
        "gen_method": draw.method,
        "beam_rank": draw.rank,
        "beam_score": _rounded(draw.probability_sum, query),
        "logprob_score": _rounded(draw.log_prob, query),
        "temperature": draw.temperature,
        "vqa_pred_answer": scores.prediction[at],
        "vqa_raw_generation": f"{scores.prediction[at]}\n",
        "vqa_correct": int(accuracy > 0),
        "vqa_acc_score": accuracy,
        "vqa_gt_prob": round(float(scores.gt_prob[at]), 6),
        "vqa_eval_mode": "fallback" if scores.is_fallback[at] else "vqaEval",
        "eval_split_used": "train",
        "eval_failed": False,
    }


def _query(split: str, items: Items, query: int) -> dict[str, Any]:
    return {
        "query_id": query,
        "question_id": QUESTION_ID_BASE[split] + query,
        "image_id": QUESTION_ID_BASE[split] + query,
        "question": items.question(query),
        "gt_answers_raw": items.answers[query],
        "gt_answers_norm": items.answers[query],
    }


def _questions(split: str, items: Items) -> dict[str, Any]:
    fields = ("question_id", "image_id", "question")
    rows = [_query(split, items, query) for query in range(len(items))]
    return {
        "info": {"description": "an embedded visual-question world", "version": "1"},
        "task_type": "Open-Ended",
        "data_type": DATASET,
        "data_subtype": f"{split}2026",
        "questions": [{name: row[name] for name in fields} for row in rows],
    }


def _annotations(split: str, items: Items) -> dict[str, Any]:
    annotations = [
        {
            "question_id": QUESTION_ID_BASE[split] + query,
            "image_id": QUESTION_ID_BASE[split] + query,
            "question_type": "one",
            "answer_type": "other",
            "multiple_choice_answer": _commonest(said),
            "answers": [
                {"answer_id": i + 1, "answer": answer, "answer_confidence": "yes"}
                for i, answer in enumerate(said)
            ],
        }
        for query, said in enumerate(items.answers)
    ]
    return {"data_type": DATASET, "data_subtype": f"{split}2026", "annotations": annotations}


def _commonest(said: list[str]) -> str:
    """What most annotators said; six of ten always agree in this world."""
    if len(said) != ANNOTATORS:
        raise AssertionError(f"{len(said)} annotations instead of {ANNOTATORS}")
    return max(sorted(set(said)), key=said.count)


def _rounded(values: np.ndarray | None, query: int) -> float | None:
    return None if values is None else round(float(values[query]), 6)


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False).encode())
