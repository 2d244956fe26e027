"""The local model: the real code through a tiny Qwen2.5-VL made from its config, no network."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lever_cli.__main__ import main
from PIL import Image
from transformers import AutoConfig

from lever_data.errors import LeverError
from lever_data.items.prompts import SYSTEM_PROMPT, Item, Prompt, Template
from lever_data.store.store import Store
from lever_train.inputs.model_folder import folder_identity
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers import make_answerer
from lever_train.rollout.answerers.base import answer_of
from lever_train.rollout.answerers.processor_model import ProcessorModel
from lever_train.rollout.answerers.transformers import TransformersAnswerer, load_model
from lever_train.rollout.answerers.vision_language import (
    Generation,
    PromptTokens,
    VisionLanguageModel,
    spoken,
)
from tests.cases import long, long_except
from tests.rollouts import add_images, make_world, rows
from tests.tiny_vlm import PROCESSED, VISION, save_tiny_processed, save_tiny_vlm

HOW = Generation(max_new_tokens=5, num_beams=3, length_penalty=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more threads, and loses much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("models") / "Tiny-VL")


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(str(folder), "cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Six prompts of different lengths, with 0 to 2 demonstrations."""
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    items = []
    for n in range(6):
        pixels = rng.integers(0, 255, (60 + 20 * n, 140 - 15 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{n}.png")
        question = f"what is {'number ' * n}{n}?"
        items.append(Item("d", "s", n, question, ("red", "blue"), "red", images / f"{n}.png"))
    return [
        Prompt(items[n], tuple(items[(n + k) % 6] for k in range(1, 1 + n % 3)), ("red", "a dog"))
        for n in range(6)
    ]


@pytest.fixture(scope="module")
def encoded(model: VisionLanguageModel, prompts: list[Prompt]) -> list[PromptTokens]:
    return [model.encode(p, Template()) for p in prompts]


def plain_inputs(model: VisionLanguageModel, one: PromptTokens, more: list[int]) -> dict[str, Any]:
    """What transformers itself is given: pixels with every call, nothing reused."""
    ids = torch.tensor([one.ids + more])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.image_token).int(),
    }
    pixels = [
        model.image_processor(images=[Image.open(p).convert("RGB")], return_tensors="pt")
        for p in one.images
    ]
    inputs["pixel_values"] = torch.cat([p["pixel_values"] for p in pixels])
    inputs["image_grid_thw"] = torch.cat([p["image_grid_thw"] for p in pixels])
    return inputs


def test_the_chat_is_interleaved_as_in_the_legacy_prompt(
    model: VisionLanguageModel, prompts: list[Prompt], encoded: list[PromptTokens]
) -> None:
    text = model.tokenizer.decode(encoded[2].ids)
    for part in ("<|image_pad|>",) * 40:
        text = text.replace(part * 2, part)
    first, second, query = prompts[2].demonstrations[0], prompts[2].demonstrations[1], prompts[2]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        f"{image}Question:{first.question} Short answer:red"
        f"{image}Question:{second.question} Short answer:red"
        f"{image}Question:{query.query.question} Short answer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    grids = [
        model.image_processor(images=[Image.open(p)], return_tensors="pt")["image_grid_thw"]
        for p in encoded[2].images
    ]
    assert encoded[2].ids.count(model.image_token) == sum(int(g.prod()) // 4 for g in grids)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [long(1), 3])
def test_texts_are_those_of_transformers_and_do_not_depend_on_the_batch(
    model: VisionLanguageModel, encoded: list[PromptTokens], beams: int
) -> None:
    how = Generation(5, beams, 0.0)
    together = model.generate(encoded, how)
    assert together == [model.generate([one], how)[0] for one in encoded]
    plain = []
    for one in encoded:
        out = model.model.generate(
            **plain_inputs(model, one, []),
            do_sample=False,
            max_new_tokens=5,
            num_beams=beams,
            length_penalty=0.0,
        )
        plain += model.tokenizer.batch_decode(out[:, len(one.ids) :], skip_special_tokens=True)
    assert [text for text, _ in together] == plain
    assert len(set(together)) > 1


def test_log_probabilities_equal_a_pass_over_the_whole_text(
    model: VisionLanguageModel, prompts: list[Prompt], encoded: list[PromptTokens]
) -> None:
    given = [("red", "a dog", "pizza train"), (), ("two",), ("red",), ("yes", "no"), ("",)]
    found = model.log_probs(encoded, given)
    assert [len(f) for f in found] == [len(g) for g in given]
    for one, answers, values in zip(encoded, given, found, strict=True):
        for answer, value in zip(answers, values, strict=True):
            assert value == pytest.approx(by_hand(model, one, answer), abs=1e-4)
    assert model.log_probs(encoded[:2], [(), ()]) == [(), ()]


@pytest.mark.slow
@pytest.mark.parametrize("family", long_except(VISION, "Qwen3VL"))
def test_every_family_is_answered_as_transformers_answers_given_the_pixels(
    family: str, tmp_path: Path, prompts: list[Prompt]
) -> None:
    """With weights large enough for every branch to matter: without its deepstack features
    Qwen3-VL was wrong by 0.08."""
    model = VisionLanguageModel.load(str(save_tiny_vlm(tmp_path, family, spread=0.1)), "cpu")
    batch = [model.encode(p, Template()) for p in prompts]
    found = model.log_probs(batch, [p.given for p in prompts])
    for one, prompt, values in zip(batch, prompts, found, strict=True):
        expected = [by_hand(model, one, answer) for answer in prompt.given]
        assert values == pytest.approx(expected, abs=1e-5, rel=1e-6)
    plain = []
    for one in batch:
        inputs = plain_inputs(model, one, [])
        out = model.model.generate(**inputs, do_sample=False, max_new_tokens=5, num_beams=3)
        plain += model.tokenizer.batch_decode(out[:, len(one.ids) :], skip_special_tokens=True)
    assert [text for text, _ in model.generate(batch, Generation(5, 3, 1.0))] == plain


@pytest.mark.long
@pytest.mark.parametrize("family", PROCESSED)
def test_a_model_with_its_own_processor_is_answered_as_transformers_answers(
    family: str, tmp_path: Path, prompts: list[Prompt]
) -> None:
    folder = save_tiny_processed(tmp_path / family, family)
    model = load_model(str(folder), "cpu")
    assert isinstance(model, ProcessorModel)
    found = make_answerer(AnswererSpec(spec=f"transformers:{folder}"), _around()).answer(prompts)
    ends = model.model.generation_config.eos_token_id
    for prompt, answer in zip(prompts, found, strict=True):
        content: list[dict[str, Any]] = []
        pictures: list[Image.Image] = []
        for item in (*prompt.demonstrations, prompt.query):
            said = item.answer if item is not prompt.query else ""
            assert item.image is not None
            pictures.append(Image.open(item.image))
            content.append({"type": "image"})
            content.append(
                {"type": "text", "text": f"Question:{item.question} Short answer:{said}"}
            )
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {"role": "user", "content": content},
        ]
        text = shown(model, family, messages)
        given = by_processor(model, text, pictures)
        width = given["input_ids"].shape[1]
        best = model.model.generate(
            **given, do_sample=False, max_new_tokens=5, num_beams=3, length_penalty=0.0
        )
        assert answer.text == model.tokenizer.decode(best[0, width:], skip_special_tokens=True)
        assert answer.log_probs is not None
        for value, wanted in zip(answer.log_probs, prompt.given, strict=True):
            if family == "PaliGemma":  # writes the line's end between prompt and suffix
                longer = by_processor(model, text, pictures, suffix=[wanted])
                ids = longer["input_ids"][0, width:-1].tolist()
            else:
                longer = by_processor(model, f"{text}{wanted}", pictures)
                ids = longer["input_ids"][0, width:].tolist()
            with torch.inference_mode():
                logits = model.model(**longer).logits[0, width - 1 :].float().log_softmax(-1)
            expected = sum(float(logits[i, t]) for i, t in enumerate([*ids, ends]))
            assert value == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_paligemma_without_an_image_is_refused_in_one_line(
    tmp_path: Path, prompts: list[Prompt]
) -> None:
    model = load_model(str(save_tiny_processed(tmp_path, "PaliGemma")), "cpu")
    with pytest.raises(LeverError, match="only where it sees an image") as error:
        model.encode(prompts[0], Template(images=False))
    assert "--without-images" in str(error.value.hint)


def shown(model: ProcessorModel, family: str, messages: list[dict[str, Any]]) -> str:
    """The words of a prompt; PaliGemma has no chat."""
    if family == "PaliGemma":
        turns = [[part.get("text", "<image>") for part in m["content"]] for m in messages]
        return "\n".join("".join(turn) for turn in turns)
    text: str = model.tokenizer.apply_chat_template(
        messages,
        chat_template=model.processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    return text


def by_processor(
    model: ProcessorModel, text: str, pictures: list[Image.Image], **more: Any
) -> dict[str, Any]:
    """What transformers itself makes of a prompt."""
    made = model.processor(text=[text], images=[pictures], return_tensors="np", **more)
    found: dict[str, Any] = made.convert_to_tensors("pt")
    found.pop("labels", None)
    return found


@pytest.mark.parametrize("kind", ["blip-2", "mllama", "kosmos-2", "llava_next"])
def test_a_model_of_another_family_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(LeverError, match="does not know models of this family") as error:
        load_model(str(tmp_path), "cpu")
    assert error.value.value == kind and "openai:URL" in str(error.value.hint)


def by_hand(model: VisionLanguageModel, one: PromptTokens, answer: str) -> float:
    """One forward pass over prompt and answer, and the probability of either end token."""
    tokens = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model.model(**plain_inputs(model, one, tokens)).logits[0].log_softmax(-1)
    at = len(one.ids) - 1
    spoken = sum(float(logits[at + i, t]) for i, t in enumerate(tokens))
    ends = model.model.generation_config.eos_token_id
    return spoken + math.log(sum(math.exp(float(logits[at + len(tokens), e])) for e in ends))


@pytest.mark.slow
def test_an_image_goes_through_the_vision_tower_once(folder: Path, prompts: list[Prompt]) -> None:
    fresh = VisionLanguageModel.load(str(folder), "cpu")
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    fresh.model.model.visual.register_forward_hook(count)
    assert fresh.read_images([i for p in prompts for i in _images(p)]) == {}
    assert passes == 6
    batch = [fresh.encode(p, Template()) for p in prompts]
    fresh.generate(batch, HOW)
    fresh.log_probs(batch, [p.given for p in prompts])
    assert passes == 6


@pytest.mark.slow
def test_features_that_were_dropped_are_computed_again(
    folder: Path,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    model: VisionLanguageModel,
    encoded: list[PromptTokens],
) -> None:
    from lever_train.rollout.answerers import vision_language

    monkeypatch.setattr(vision_language, "FEATURE_BYTES", 1)
    small = VisionLanguageModel.load(str(folder), "cpu")
    batch = [small.encode(p, Template()) for p in prompts]
    assert batch == encoded
    assert small.generate(batch, HOW) == model.generate(encoded, HOW)


@pytest.fixture
def answerer(folder: Path) -> Iterator[TransformersAnswerer]:
    found = make_answerer(AnswererSpec(spec=f"transformers:{folder}", batch_size=4), _around())
    assert isinstance(found, TransformersAnswerer)
    yield found


def _around() -> Any:
    from lever_train.rollout.answerers import Surroundings

    return Surroundings()


def _images(prompt: Prompt) -> list[Path]:
    return [i.image for i in (*prompt.demonstrations, prompt.query) if i.image is not None]


@pytest.mark.long
def test_answers_come_back_in_order(
    answerer: TransformersAnswerer,
    model: VisionLanguageModel,
    prompts: list[Prompt],
    encoded: list[PromptTokens],
) -> None:
    found = answerer.answer(prompts)
    assert [a.text for a in found] == [model.generate([e], HOW)[0][0] for e in encoded]
    for answer, one in zip(found, encoded, strict=True):
        expected = model.log_probs([one], [("red", "a dog")])[0]
        assert answer.log_probs == pytest.approx(expected, abs=1e-4)
    assert answerer.name.startswith("Tiny-VL@")
    assert answerer.usage.answers == 6


def test_an_answer_that_the_token_limit_cut_says_so(
    answerer: TransformersAnswerer, prompts: list[Prompt], encoded: list[PromptTokens]
) -> None:
    """The real model, told what to say: nothing up to the limit, thoughts up to it, an answer."""
    answerer.answer(prompts[:1])
    model = answerer._model
    assert isinstance(model, VisionLanguageModel)
    end, image = model._ends[0], model.image_token
    words = model.tokenizer("<think> red", add_special_tokens=False)["input_ids"]
    for tokens, cut, error in (
        ([image] * 5, True, "the answer is empty before the token limit (--max-new-tokens)"),
        ([image, end], False, None),
        (words, True, "the model reasoned and gave no answer before the token limit"),
        (model.tokenizer("red")["input_ids"], True, None),
    ):
        ((text, was_cut),) = spoken(model.tokenizer, torch.tensor([tokens]), model._ends)
        found = answer_of(text, cut=was_cut)
        assert was_cut == cut and (error or "None") in str(found.error)
    model.model.register_forward_hook(lambda module, args, out: _say(out, image))
    before = answerer.usage.cut
    (failed,) = answerer.answer(prompts[1:2])
    assert failed.text is None and "the answer is empty before" in str(failed.error)
    assert answerer.usage.cut == before + 1


def _say(out: Any, token: int) -> None:
    out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(token), out.logits.shape[-1]) * 99


@pytest.mark.long
def test_out_of_memory_halves_the_batch(
    answerer: TransformersAnswerer, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    """The real model refuses batches above 6 sequences (two prompts of three beams)."""
    expected = [a.text for a in answerer.answer(prompts)]
    inner = answerer._model
    assert inner is not None
    sizes = []

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        count = len(kwargs["inputs_embeds"] if ids is None else ids)
        sizes.append(count)
        if count > 6:
            raise torch.OutOfMemoryError("a test says so")

    handle = inner.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert [a.text for a in answerer.answer(prompts)] == expected
    assert "batches of 2 from here on" in caplog.text
    assert max(sizes) == 12
    handle.remove()
    inner.model.register_forward_pre_hook(_never_fits)
    failed = answerer.answer(prompts[:2])
    assert [a.text for a in failed] == [None, None]
    assert {a.error for a in failed} == {"the device has not enough memory for this prompt alone"}


def _never_fits(module: torch.nn.Module, args: Any) -> None:
    raise torch.OutOfMemoryError("a test says so")


@pytest.mark.long
def test_a_model_that_depends_on_the_batch_answers_one_by_one(
    answerer: TransformersAnswerer,
    prompts: list[Prompt],
    encoded: list[PromptTokens],
    model: VisionLanguageModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = [model.generate([e], HOW)[0][0] for e in encoded]
    answerer._model = VisionLanguageModel.load(answerer.model_name, "cpu")

    def disturb(module: torch.nn.Module, args: Any, output: Any) -> None:
        if len(output.logits) > 3:  # more than one prompt of three beams
            output.logits += torch.randn_like(output.logits) * 50

    answerer._model.model.register_forward_hook(disturb)
    with caplog.at_level(logging.WARNING):
        found = answerer.answer(prompts)
    assert "answers depend on the batch" in caplog.text
    assert [a.text for a in found] == alone


@pytest.mark.slow
def test_an_unreadable_image_fails_alone(
    answerer: TransformersAnswerer, prompts: list[Prompt], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = Item("d", "s", 9, "q?", ("a",), "a", broken)
    found = answerer.answer([prompts[0], Prompt(bad, ()), prompts[1]])
    assert found[1].text is None
    assert found[1].error == f"an image cannot be read: it is not an image: {broken}"
    assert found[0].text is not None and found[2].text is not None


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    for load in (load_model, VisionLanguageModel.load):
        with pytest.raises(LeverError, match="the model cannot be loaded"):
            load(str(missing), "cpu")


def test_parameters_change_the_scope(folder: Path) -> None:
    def told(**changes: Any) -> dict[str, Any]:
        return make_answerer(
            AnswererSpec(spec=f"transformers:{folder}", **changes), _around()
        ).generation()

    assert told() == told(batch_size=7)  # how it is batched is not part of an answer
    others = [told(max_new_tokens=6), told(num_beams=1), told(length_penalty=1.0)]
    assert all(other != told() for other in others)
    name = make_answerer(AnswererSpec(spec="qwen2.5_vl_3B"), _around())
    assert name.name == f"Qwen2.5-VL-3B-Instruct#{Template().sha256()[:8]}"


def test_another_model_in_a_folder_of_the_same_name_is_another_scorer(
    folder: Path, tmp_path: Path
) -> None:
    """A fine-tuned model has the config of the old one; its answers are never the old ones."""

    def told(path: Path) -> tuple[str, Any]:
        answerer = make_answerer(AnswererSpec(spec=f"transformers:{path}"), _around())
        return answerer.name, answerer.generation()["model"]

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("what it was trained on")
    (copy / "optimizer.pt").write_bytes(b"where its training stands")
    assert told(copy) == told(folder)
    for name in ("model.safetensors", "chat_template.jinja"):
        before = told(copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
        assert told(copy)[0] != before[0] and told(copy)[1] != before[1], name
    (copy / "model.safetensors").unlink()
    (copy / "model-00001-of-00002.safetensors").symlink_to(folder / "model.safetensors")
    assert told(copy)[0] != told(folder)[0]


@pytest.mark.slow
def test_the_command_as_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, queries=14)
    add_images(world)
    words = world.argv("--answerer", f"transformers:{folder}", "--image-root", str(world.images))
    more = ["--limit", "3", "--num-beams", "2", "--temps", "1.0", "--shots", "1,2"]
    with pytest.raises(SystemExit) as end:
        main([*words, *more])
    assert end.value.code == 0, capfd.readouterr().err
    (run,) = Store.open(world.store).runs()
    found = rows(run)
    assert len({r["query_id"] for r in found}) == 3
    assert {r["scorer"] for r in found} == {f"{folder_identity(folder)}#{Template().sha256()[:8]}"}
    assert all(0 <= r["expected_score"] < 0.1 for r in found)  # random weights know nothing
    assert all(len(r["shot_scores"]) == 2 for r in found)
