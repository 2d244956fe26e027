-- Runs as their manifests describe them.
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
with source as (select * from raw_runs),

final as (
    select
        run::varchar as run,
        kind::varchar as kind,
        dataset::varchar as dataset,
        split::varchar as split,
        committed_at::varchar as committed_at,
        num_candidates::bigint as num_candidates,
        num_queries::bigint as num_queries,
        query_low::bigint as query_low,
        query_high::bigint as query_high,
        parents::varchar[] as parents
    from source
)

select * from final
