-- Runs of the store in the order of their commits.
-- grain: one row per run
-- columns:
--   run varchar: id of the run the row is stored in
--   kind varchar: rl_data, beam, rollout, rescore, examples, embeddings, training, evaluation or sweep
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   committed_at varchar: time of the commit, UTC; of a compacted run that of its newest member
--   num_candidates bigint: rows of candidates
--   num_queries bigint: rows of queries
--   query_low bigint: lowest query id
--   query_high bigint: highest query id
--   parents varchar[]: runs this one was made from
--   run_order bigint: 1 for the oldest run
--   may_overlap boolean: true where another selected run may hold the same candidates
with stored as (select * from stg_runs),

ordered as (
    select
        *,
        row_number() over (order by committed_at, run) as run_order,
        kind in ('rl_data', 'rollout', 'rescore') as is_rl
    from stored
),

overlapping as (
    select distinct a.run
    from ordered as a
    inner join ordered as b
        on
            a.run <> b.run
            and a.is_rl and b.is_rl
            and a.dataset = b.dataset and a.split = b.split
            and a.query_low <= b.query_high and b.query_low <= a.query_high
),

final as (
    select
        ordered.run,
        ordered.kind,
        ordered.dataset,
        ordered.split,
        ordered.committed_at,
        ordered.num_candidates,
        ordered.num_queries,
        ordered.query_low,
        ordered.query_high,
        ordered.parents,
        ordered.run_order,
        overlapping.run is not null as may_overlap
    from ordered
    left join overlapping on ordered.run = overlapping.run
)

select * from final
