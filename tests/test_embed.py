"""`lever embed` through a tiny CLIP and a tiny text encoder, built here from their configs."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertModel,
)

from lever_data import connect
from lever_data.errors import LeverError
from lever_data.readers.torch_file import read_torch
from lever_data.store.store import Store
from lever_train.embed import embed as embedding
from lever_train.embed.embed import embed, require_same_space
from lever_train.embed.encoders import Encoder
from lever_train.inputs.embeddings import load_embeddings
from lever_train.options.embed import EmbedRequest
from tests.commands import lever
from tests.encoders import QUESTIONS, tiny_clip, tiny_tokenizer
from tests.stores import commit_examples


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "store")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for item in range(len(QUESTIONS)):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{item}.png")
    commit_examples(
        store,
        [
            {
                "dataset": "d",
                "split": "train",
                "example_id": item,
                "question_id": item,
                "image_path": f"{item}.png",
                "question": question,
                "answers": ["tea"],
                "answer": "tea",
            }
            for item, question in enumerate(QUESTIONS)
        ],
    )
    return store


def _request(store: Store, encoder: Path, **more: object) -> EmbedRequest:
    images = store.path.parent / "images"
    return EmbedRequest(store=store.path, encoder=str(encoder), image_root=images, **more)


def _vectors(store: Store, name: str) -> torch.Tensor:
    return load_embeddings(name, connect(store))


@pytest.mark.long
def test_both_is_the_sum_of_text_and_image(store: Store, clip: Path) -> None:
    for features in ("text", "image", "both"):
        embed(_request(store, clip, features=features, name=features, batch_size=3))
    text, image, both = (_vectors(store, n) for n in ("text", "image", "both"))
    for vectors in (text, image, both):
        assert vectors.shape == (4, 6)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(both, normalize(text + image, dim=-1))
    assert not torch.allclose(text[0], text[1]) and not torch.allclose(image[0], image[1])


@pytest.mark.long
def test_vectors_of_another_encoder_are_not_compared(
    store: Store, clip: Path, tmp_path: Path
) -> None:
    request = _request(store, clip, out=tmp_path / "own")
    own, _ = embed(request).files
    require_same_space(request, own)
    vectors, other = torch.load(own, weights_only=True), tmp_path / "other.pt"
    for wrong, message in (
        (vectors.flip(0), "the cosine of the same query is "),
        (vectors[:, :5].clone(), "5 numbers a vector, the encoder gives 6"),
    ):
        torch.save(wrong, other)
        with pytest.raises(LeverError, match=message):
            require_same_space(request, other)


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_TEXT = _SMALL | _ENDS | {"vocab_size": 40, "max_position_embeddings": 20}
_SIGHT = _SMALL | {"image_size": 16, "patch_size": 8}
_JOINT = {"text_config": _TEXT, "vision_config": _SIGHT, "projection_dim": 6}
_TALL = {"text_config": _TEXT | {"projection_size": 16}}
_EFFICIENT = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "CLIP": _JOINT,
    "MetaClip2": _JOINT,
    "ChineseCLIP": _JOINT,
    "AltCLIP": _JOINT | {"text_config": _TEXT | {"project_dim": 6}},
    "Align": _JOINT | {"vision_config": _EFFICIENT | {"hidden_dim": 16}},
    "Siglip": _TALL | {"vision_config": _SIGHT},
    "Siglip2": _TALL | {"vision_config": _SMALL | {"num_patches": 16, "patch_size": 8}},
    "Bert": _TEXT,
    "Roberta": _TEXT,
    "MPNet": _TEXT,
    "ModernBert": _TEXT | {"cls_token_id": 0, "sep_token_id": 1},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16} | _ENDS,
    "T5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_has_the_same_vector_in_every_batch(family: str, tmp_path: Path) -> None:
    """SigLIP's had cosine 0.38 between batches, padded to their longest text."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    for weights in model.parameters():  # large enough for texts to differ
        weights.data += 0.3 * torch.randn_like(weights)
    model.save_pretrained(tmp_path)
    if family == "Siglip2":  # has a tokenizer of its own kind
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
        vocab = {word: number for number, word in enumerate(words)}
        transformers.Siglip2Tokenizer(vocab, [], model_max_length=20).save_pretrained(tmp_path)
    else:
        tiny_tokenizer(tmp_path)
    encoder = Encoder(str(tmp_path), "cpu", images=False)
    together = encoder.texts(QUESTIONS)
    alone = torch.cat([encoder.texts([text]) for text in QUESTIONS])
    assert (together * alone).sum(-1).min() >= 0.9999
    assert (together[:1] @ together[1:].T).max() < 0.999
    if "Siglip" in family:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        given = tokenizer(QUESTIONS, padding="max_length", truncation=True, return_tensors="pt")
        given.pop("token_type_ids", None)
        with torch.no_grad():
            expected = model.get_text_features(**given).pooler_output
        torch.testing.assert_close(together, normalize(expected, dim=-1))


@pytest.mark.long
def test_candidates_with_answers_are_another_set(store: Store, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    found = embed(_request(store, clip, with_answers=True, out=out, name="x"))
    assert found.queries.run != found.candidates.run
    for role, name in (("query", "x"), ("candidate", "x-answered")):
        saved = read_torch(out / f"{role}_embeddings.pt")
        assert isinstance(saved, np.ndarray) and saved.dtype == np.float32
        assert (saved == _vectors(store, name).numpy()).all()
    assert not torch.allclose(_vectors(store, "x"), _vectors(store, "x-answered"))


@pytest.mark.slow
def test_again_is_the_same_run_and_a_killed_one_goes_on(
    store: Store, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART_ROWS", 1)
    calls: list[float] = []

    def stop_after_two(done: float, total: float | None, note: str) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(_request(store, clip), stop_after_two)
    parts = sorted((store.path / "jobs").rglob("part-*.npy"))
    assert len(parts) == 2
    stamps = [p.stat().st_mtime_ns for p in parts]
    seen: list[int] = []
    first = embed(
        _request(store, clip),
        lambda done, total, note: seen.extend(p.stat().st_mtime_ns for p in parts),
    )
    assert first.is_new and seen[:2] == stamps
    again = embed(_request(store, clip))
    assert not again.is_new and again.queries.run == first.queries.run
    assert not any((store.path / "jobs").iterdir())


@pytest.mark.long
def test_another_encoder_in_the_folder_makes_another_run(
    store: Store, clip: Path, tmp_path: Path
) -> None:
    """Its words count too, whatever file they stand in."""
    copy = tmp_path / clip.name
    shutil.copytree(clip, copy)
    first = embed(_request(store, clip, features="text", name="x"))
    assert not embed(_request(store, copy, features="text", name="x")).is_new
    (copy / "merges.txt").write_text("a b")
    again = embed(_request(store, copy, features="text", name="x"))
    assert again.is_new and again.queries.run != first.queries.run


@pytest.mark.long
def test_other_images_make_another_run(store: Store, clip: Path) -> None:
    """Under the same names; an encoder of texts does not look at them."""
    runs = {f: embed(_request(store, clip, features=f, name=f)) for f in ("text", "both")}
    picture = store.path.parent / "images" / "2.png"
    Image.new("RGB", (20, 24), (255, 0, 0)).save(picture)
    assert not embed(_request(store, clip, features="text", name="text")).is_new
    again = embed(_request(store, clip, features="both", name="both"))
    assert again.is_new and again.queries.run != runs["both"].queries.run
    picture.unlink()
    with pytest.raises(LeverError, match=r"an image cannot be read .No such file"):
        embed(_request(store, clip, features="both", name="both"))


@pytest.mark.long
def test_one_bad_image_is_one_failed_item(store: Store, clip: Path) -> None:
    """Named, and where the user says so gone on without: its vector is zeros."""
    whole = embed(_request(store, clip, features="both", name="whole")).queries
    picture = store.path.parent / "images" / "2.png"
    for content in (b"", b"<html>", picture.read_bytes()[:-30]):
        picture.write_bytes(content)
        with pytest.raises(LeverError, match=r"an image cannot be read .*2\.png") as error:
            embed(_request(store, clip, features="both", batch_size=3))
        assert "--allow-failed" in str(error.value.hint)
    found = embed(_request(store, clip, features="both", name="x", allow_failed=True))
    assert list(found.failed) == [2] and "truncated" in found.failed[2]
    assert found.queries.details["failed"] == [2] and "failed" not in whole.details
    vectors, expected = _vectors(store, "x"), _vectors(store, "whole")
    expected[2] = 0
    torch.testing.assert_close(vectors, expected)


@pytest.mark.long
def test_a_text_encoder_averages_its_tokens(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    embed(EmbedRequest(store=store.path, encoder=str(folder), features="text", name="bert"))
    ids = torch.tensor([[0, *_ids(folder, "who uses this"), 1]])
    with torch.no_grad():
        expected = normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
    torch.testing.assert_close(_vectors(store, "bert")[1:2], expected)
    done = lever(
        "embed", "--store", store.path, "--encoder", folder, "--features", "both",
        "--image-root", store.path.parent / "images", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "this encoder has no image tower" in done.stderr


def _ids(folder: Path, text: str) -> list[int]:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocab[word] for word in text.split()]


@pytest.mark.slow
def test_the_command_and_its_errors(store: Store, clip: Path, tmp_path: Path) -> None:
    common = ["embed", "--store", store.path, "--encoder", clip]
    images = ["--image-root", tmp_path / "images"]
    done = lever(*common, *images, "--json", "-")
    assert json.loads(done.stdout)["names"][0].endswith("-both")
    assert "already embedded: 4 items" in lever(*common, *images).stdout
    refused = lever(*common, check=False)
    assert refused.returncode == 2 and "--image-root DIR" in refused.stderr
    none = lever(
        "embed", "--store", store.path, "--encoder", tmp_path, "--features", "text", check=False
    )
    assert none.returncode == 2 and "the encoder cannot be loaded" in none.stderr
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(LeverError, match=r"an image cannot be read .it is not an image.*2\.png"):
        embed(_request(store, clip, features="image"))
