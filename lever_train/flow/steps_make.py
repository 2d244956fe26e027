"""Steps that make what training needs: tables of the given files, embeddings, pools, RL data.

Each function takes the :class:`Work` of the pipeline and returns one :class:`Step`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lever_data import connect
from lever_data.errors import UsageError
from lever_data.paths import store_name
from lever_data.sources.export import export
from lever_data.sources.ingest import ingest as ingest_library
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_train.flow.foresight import require_answerer, require_encoder
from lever_train.flow.legacy_files import has_examples
from lever_train.flow.pipeline import Outputs, Step, require_own
from lever_train.flow.work import StepOutputs, Work, given, save_array

if TYPE_CHECKING:
    from lever_train.options.rollout import Recipe, Request
    from lever_train.rollout.generate import Outcome


def ingest(work: Work) -> Step:
    """The given files of both splits, into the store."""
    data = work.config.data
    reads = {f"RL data {i + 1}": p for i, p in enumerate(data.rl_data)}
    reads |= {f"beam data {i + 1}": p for i, p in enumerate(data.beam_data)}
    reads |= {
        name: path
        for name, path in (
            ("items", data.items),
            ("eval items", data.eval_items),
            ("questions", data.questions),
            ("annotations", data.annotations),
            ("eval questions", data.eval_questions),
            ("eval annotations", data.eval_annotations),
        )
        if path is not None
    }
    reads |= {f"train text {name}": path for name, path in data.texts.items()}
    reads |= {f"eval text {name}": path for name, path in data.eval_texts.items()}

    def act(known: StepOutputs, begun: bool) -> Outputs:
        with Store.to_fill(data.store) as store:
            found = _ingest_splits(work, store)
        return {
            "rl": [run for kind, run in found if kind == "rl_data"],
            "beam": [run for kind, run in found if kind == "beam"],
            "examples": [run for kind, run in found if kind == "examples"],
            "paths": [str(store.run(run).path) for _, run in found],
        }

    parameters: dict[str, object] = {
        "store": store_name(data.store),
        "dataset": data.dataset,
        "splits": [data.train_split, data.eval_split],
    }
    if data.order != "file":
        parameters["order"] = data.order
    if work.config.given_task is not None:
        parameters["task"] = work.config.given_task.stored()
    if columns := work.config.columns.model_dump(mode="json", exclude_defaults=True):
        parameters["columns"] = columns
    return Step("ingest", act, parameters, reads)


def embed(work: Work) -> Step:
    """Query, candidate and eval embeddings, where none are given."""
    from lever_train.embed.embed import embed as library
    from lever_train.embed.embed import require_same_space
    from lever_train.options.embed import EmbedRequest

    data, table = work.config.data, work.config.embed
    cache = data.cache or work.out / "cache" / data.train_split

    def guard() -> None:
        require_encoder(work)
        if data.cache is not None:
            files = [cache / f"{role}_embeddings.pt" for role in ("query", "candidate")]
            require_own(work.out, files)

    def act(known: StepOutputs, begun: bool) -> Outputs:
        files: dict[str, str] = {}
        if table.templates:
            return _embed_spaces(work)
        request = EmbedRequest(
            **table.encoding,
            store=data.store,
            dataset=data.dataset,
            split=data.train_split,
            image_root=data.image_root,
            image_name=data.image_name,
            device=work.config.train.run.device,
        )
        if data.query_embeddings is not None:
            require_same_space(request, data.query_embeddings)
        for split in splits:
            if split != data.train_split and not has_examples(data.store, data.dataset, split):
                continue
            out = cache if split == data.train_split else work.out / "cache" / split
            request = request.model_copy(update={"split": split, "out": out})
            query, candidate = library(request, work.advance).files
            if split == data.train_split:
                files |= {"query": str(query), "candidate": str(candidate)}
            if split == data.eval_split:
                files["eval"] = str(query)
        return {**files, "paths": list(files.values())}

    splits = [s for s in dict.fromkeys((data.train_split, data.eval_split)) if work.embeds(s)]
    idle = None if splits else "embeddings are given"
    parameters = {**table.encoding, **_images(work)}
    if table.templates:
        parameters |= {"templates": table.templates, "compared": table.compared}
    reads = given(query_embeddings=data.query_embeddings)
    return Step("embed", act, parameters, reads, after=("ingest",), idle=idle, guard=guard)


def _embed_spaces(work: Work) -> Outputs:
    """A run of the store for every template and split; what is compared, by the names there."""
    from lever_train.embed.embed import embed as library
    from lever_train.options.embed import EmbedRequest

    data, table = work.config.data, work.config.embed
    runs = []
    for split in dict.fromkeys((data.train_split, data.eval_split)):
        for name, template in table.templates.items():
            if split != data.train_split and "{answer}" in template:
                continue
            request = EmbedRequest(
                **table.encoding,
                store=data.store,
                dataset=data.dataset,
                split=split,
                template=template,
                name=name,
                image_root=data.image_root,
                image_name=data.image_name,
                device=work.config.train.run.device,
            )
            runs.append(str(library(request, work.advance).queries.path))
    side_by_side = ",".join(table.compared)
    return {**dict.fromkeys(("query", "candidate", "eval"), side_by_side), "paths": runs}


def pool(work: Work) -> Step:
    """The most similar train items of every query, where no pools are given."""
    from lever_train.flow.similar import similar_pools
    from lever_train.inputs.embeddings import load_embeddings

    data, size = work.config.data, work.config.pool.size

    def act(known: StepOutputs, begun: bool) -> Outputs:
        assert size is not None
        con = connect(data.store, only=["embeddings"])
        query, candidate, held_out = work.embeddings(known)
        of_train = (data.dataset, data.train_split)
        table = load_embeddings(candidate, con, of_train)
        made: dict[str, str] = {}
        if data.pool is None:
            queries = load_embeddings(query, con, of_train)
            pools = similar_pools(queries, table, size, leave_out_self=True)
            made["train"] = save_array(work.out / "pools" / "train.npy", pools)
        if held_out is not None and data.eval_pool is None:
            own = data.eval_split == data.train_split
            queries = load_embeddings(held_out, con, (data.dataset, data.eval_split))
            pools = similar_pools(queries, table, size, leave_out_self=own)
            made["eval"] = save_array(work.out / "pools" / "eval.npy", pools)
        return {**made, "paths": list(made.values())}

    idle = None
    if size is None:
        idle = "no size is set: the given or stored pools count"
    elif data.pool is not None and data.eval_pool is not None:
        idle = "pools are given"
    reads = given(
        query_embeddings=data.query_embeddings,
        candidate_embeddings=data.candidate_embeddings,
        eval_embeddings=data.eval_embeddings,
    )
    return Step("pool", act, {"size": size}, reads, ("embed",), idle=idle)


def beam(work: Work) -> Step:
    """InfoScore beams for SFT, where neither they nor a checkpoint are given."""
    from lever_train.rollout.infoscore import search_beams

    config = work.config

    def act(known: StepOutputs, begun: bool) -> Outputs:
        table = config.beam
        recipe = table.recipe()
        request = rollout_request(work, known, recipe, table.shot_num, table.limit)
        request = request.but(which=request.which.but(**queries))
        return as_outputs(work, search_beams(request, progress=work.advance))

    # rounds are judged on questions that teach nothing, SFT included
    queries = {"queries": "training_folds"} if config.rounds.count else {}

    idle = None
    if work.has_sft:
        idle = "an SFT checkpoint is given"
    elif not config.sft.enabled:
        idle = "SFT is turned off"
    elif config.data.beam_data:
        idle = "InfoScore beams are given"
    parameters = {"beam": config.beam.model_dump(), **queries, **answering(work)}
    reads, after = work.rollout_files(), ("ingest", "embed", "pool")
    guard = partial(require_answerer, work)
    return Step("beam", act, parameters, reads, after, idle=idle, guard=guard)


def generate(work: Work) -> Step:
    """RL data by rollout from the SFT policy, or from similarity where there is none."""
    from lever_train.options.rollout import Recipe
    from lever_train.rollout.generate import generate as library

    data, table = work.config.data, work.config.generate

    def act(known: StepOutputs, begun: bool) -> Outputs:
        recipe = Recipe(**table.model_dump(include=set(Recipe.model_fields)))
        request = rollout_request(work, known, recipe, table.shot_num, table.limit)
        checkpoint = known.get("sft", {}).get("checkpoint")
        inputs = request.inputs.but(checkpoint=checkpoint)
        outcome = library(request.but(inputs=inputs), progress=work.advance)
        done = as_outputs(work, outcome)
        if data.rl_out is not None:
            data.rl_out.parent.mkdir(parents=True, exist_ok=True)
            export(Store.open(data.store), done["run"], data.rl_out, reader=data.rl_reader)
            done["paths"].append(str(data.rl_out))
        return done

    idle = "RL data is given" if data.rl_data and not table.also else None
    parameters = {"generate": table.model_dump(mode="json"), **answering(work)}
    if data.rl_reader != "newest":
        parameters["rl_reader"] = data.rl_reader
    reads, after = work.rollout_files(), ("ingest", "embed", "pool", "sft")

    def guard() -> None:
        require_answerer(work)
        if data.rl_out is not None:
            require_own(work.out, [data.rl_out])

    return Step("generate", act, parameters, reads, after, idle=idle, guard=guard)


def rollout_request(
    work: Work, known: StepOutputs, recipe: Recipe, shot_num: int, limit: int | None
) -> Request:
    """A rollout over the train split, of queries and demonstrations alike."""
    from lever_train.options.rollout import Inputs, Request, Which

    data = work.config.data
    query, candidate, _ = work.embeddings(known)
    return Request(
        which=Which(
            store=data.store,
            dataset=data.dataset,
            split=data.train_split,
            candidate_split=data.train_split,
            task=work.config.given_task,
            limit=limit,
        ),
        inputs=Inputs(
            query_embeddings=query,
            candidate_embeddings=None if candidate == query else candidate,
            pool=work.pools(known)[0],
            questions=data.questions,
            annotations=data.annotations,
            image_root=data.image_root,
            image_name=data.image_name,
            device=work.config.train.run.device,
        ),
        recipe=recipe,
        answerer=work.config.answerer.answerer,
        shot_num=shot_num,
    )


def as_outputs(work: Work, outcome: Outcome) -> Outputs:
    """What a step that rolled out made: the run, and its folder."""
    for line in outcome.notices:
        work.say(line)
    assert outcome.run is not None
    run = outcome.run.run
    return {"run": run, "paths": [str(Store.open(work.config.data.store).run(run).path)]}


def answering(work: Work) -> dict[str, object]:
    """Who answers a rollout, and what may be shown."""
    return {
        "answerer": work.config.answerer.answerer.model_dump(mode="json"),
        **_images(work),
        **work.task(),
    }


def _images(work: Work) -> dict[str, object]:
    """Where images lie, and how their files are named."""
    data = work.config.data
    root = None if data.image_root is None else str(data.image_root)
    return {"image_root": root, "image_name": data.image_name}


def _ingest_splits(work: Work, store: Store) -> list[tuple[str, str]]:
    """(kind, run id) of every file of both splits: what they hold first, then texts of items."""
    data = work.config.data
    questions = _both(data.questions, data.annotations)
    files = (*data.rl_data, *data.beam_data, *_one(data.items), *questions)
    found = _ingest_split(work, store, data.train_split, files)
    if data.eval_split != data.train_split:
        questions = _both(data.eval_questions, data.eval_annotations)
        found += _ingest_split(work, store, data.eval_split, (*_one(data.eval_items), *questions))
    for split, texts in ((data.train_split, data.texts), (data.eval_split, data.eval_texts)):
        for name, path in texts.items():
            found += _ingest_split(work, store, split, (path,), name)
    return found


def _ingest_split(
    work: Work, store: Store, split: str, files: tuple[Path, ...], name: str | None = None
) -> list[tuple[str, str]]:
    """(kind, run id) of every file; embeddings and pools are read where they lie."""
    data = work.config.data
    options = IngestOptions(
        dataset=data.dataset,
        split=split,
        name=name,
        order=data.order,
        task=work.config.given_task,
        columns=work.config.columns,
        notice=work.say,
    )
    return [(done.run.kind, done.run.run) for done in ingest_library(files, store, options)]


def _one(file: Path | None) -> tuple[Path, ...]:
    return () if file is None else (file,)


def _both(questions: Path | None, annotations: Path | None) -> tuple[Path, ...]:
    if (questions is None) != (annotations is None):
        raise UsageError("questions and annotations belong together: give both or neither")
    return () if questions is None or annotations is None else (questions, annotations)
