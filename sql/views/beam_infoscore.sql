-- InfoScore beam data for supervised training; of a query and shot number that several beam runs
-- hold, the newest run counts.
-- grain: one row per query, shot number and beam
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   candidate integer: ordinal in the source, from 0
--   shot_num tinyint: number of demonstrations, the length of pointer
--   pointer integer[]: ordered example ids of the demonstrations
--   gen_method varchar: beam, sample, random, retrieval or empty
--   eval_mode varchar: always null: no answer was scored
--   eval_failed boolean: always null
--   info_score double: InfoScore in nats
--   rank integer: 0 for the best beam of the query
with stored as (select * from stg_beams),

compared as (
    select
        stored.*,
        runs.run_order,
        max(runs.run_order)
            over (partition by stored.dataset, stored.split, stored.query_id, stored.shot_num)
            as newest
    from stored
    inner join runs on stored.run = runs.run
),

final as (
    select
        run,
        dataset,
        split,
        query_id,
        candidate,
        shot_num,
        pointer,
        gen_method,
        eval_mode,
        eval_failed,
        info_score,
        beam_rank as rank
    from compared
    where run_order = newest
)

select * from final
