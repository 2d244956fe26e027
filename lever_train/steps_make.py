"""Steps that make what training needs: embeddings, pools, RL data.

Each function takes the :class:`Work` of the pipeline and returns one :class:`Step`.
"""

from __future__ import annotations

from lever_data import connect
from lever_data.store import Store
from lever_train.pipeline import Outputs, Step
from lever_train.steps import Known, Work, given, save_array


def embed(work: Work) -> Step:
    """Query, candidate and eval embeddings, where none are given."""
    from lever_train.embed import embed as library
    from lever_train.embed_request import EmbedRequest

    data, table = work.config.data, work.config.embed

    def act(known: Known, begun: bool) -> Outputs:
        files: dict[str, str] = {}
        for split in dict.fromkeys((data.train_split, data.eval_split)):
            request = EmbedRequest(
                store=data.store,
                encoder=table.encoder,
                dataset=data.dataset,
                split=split,
                features=table.features,
                image_root=data.image_root,
                batch_size=table.batch_size,
                device=work.config.train.run.device,
                out=work.out / "cache" / split,
            )
            query, candidate = library(request, work.advance).files
            if split == data.train_split:
                files |= {"query": str(query), "candidate": str(candidate)}
            if split == data.eval_split:
                files["eval"] = str(query)
        return {**files, "paths": list(files.values())}

    idle = "embeddings are given" if data.query_embeddings is not None else None
    parameters = {**table.model_dump(), "image_root": str(data.image_root)}
    return Step("embed", act, parameters, after=("ingest",), idle=idle)


def pool(work: Work) -> Step:
    """The most similar train items of every query, where no pools are given."""
    from lever_train.embeddings import load_embeddings
    from lever_train.similar import similar_pools

    data, size = work.config.data, work.config.pool.size

    def act(known: Known, begun: bool) -> Outputs:
        assert size is not None
        con = connect(data.store)
        query, candidate, held_out = work.embeddings(known)
        table = load_embeddings(candidate, con)
        made: dict[str, str] = {}
        if data.pool is None:
            pools = similar_pools(load_embeddings(query, con), table, size, leave_out_self=True)
            made["train"] = save_array(work.out / "pools" / "train.npy", pools)
        if held_out is not None and data.eval_pool is None:
            own = data.eval_split == data.train_split
            queries = load_embeddings(held_out, con)
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


def generate(work: Work) -> Step:
    """RL data by rollout from the SFT policy, or from similarity where there is none."""
    from pathlib import Path

    from lever_train.rollout.generate import generate as library
    from lever_train.rollout.request import AnswererSpec, Inputs, Recipe, Request, Which

    data, table, answerer = work.config.data, work.config.generate, work.config.answerer

    def act(known: Known, begun: bool) -> Outputs:
        query, candidate, _ = work.embeddings(known)
        checkpoint = known.get("sft", {}).get("checkpoint")
        train_pool = work.pools(known)[0]
        device = work.config.train.run.device
        recipe = table.model_dump(exclude={"also", "queries"})
        request = Request(
            which=Which(
                data.store,
                dataset=data.dataset,
                split=data.train_split,
                candidate_split=data.train_split,
                limit=table.queries,
            ),
            inputs=Inputs(
                query_embeddings=query,
                candidate_embeddings=None if candidate == query else candidate,
                pool=None if train_pool is None else Path(train_pool),
                checkpoint=None if checkpoint is None else Path(checkpoint),
                questions=data.questions,
                annotations=data.annotations,
                image_root=data.image_root,
                device=device,
            ),
            recipe=Recipe(**recipe),
            answerer=AnswererSpec(spec=answerer.spec, model=answerer.model, device=device),
            shot_num=table.shot_num,
        )
        outcome = library(request, progress=work.advance)
        for line in outcome.notices:
            work.say(line)
        assert outcome.run is not None
        run = outcome.run.run
        return {"run": run, "paths": [str(Store.open(data.store).run(run).path)]}

    idle = "RL data is given" if data.rl_data and not table.also else None
    parameters = {
        "generate": table.model_dump(mode="json"),
        "answerer": {"spec": answerer.spec, "model": answerer.model},
    }
    reads = given(pool=data.pool, query_embeddings=data.query_embeddings)
    return Step("generate", act, parameters, reads, ("ingest", "embed", "pool", "sft"), idle=idle)
