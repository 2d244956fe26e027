-- The columns of scored that whole-store diagnostics read, and no more; `lever audit` keeps them
-- in memory (some 75 bytes a candidate).
-- grain: one row per candidate
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   shot_num tinyint: number of demonstrations, the length of pointer
--   pointer integer[]: ordered example ids of the demonstrations
--   gen_method varchar: beam, sample, random, retrieval or empty
--   beam_rank integer: 0 for the best beam
--   logprob_score double: sequence log-probability in nats, at temperature
--   temperature double: sampling temperature; null where not sampled
--   eval_mode varchar: file (official metric), fallback (string match) or null (unknown)
--   correct tinyint: 1 where the metric calls the answer right, else 0
--   score double: of the task's metric, in [0, 1]
--   reward double: the reward in [-5, 5]; a missing one is 0
with source as (select * from scored),

final as (
    select
        dataset,
        split,
        query_id,
        shot_num,
        pointer,
        gen_method,
        beam_rank,
        logprob_score,
        temperature,
        eval_mode,
        correct,
        score,
        reward
    from source
)

select * from final
