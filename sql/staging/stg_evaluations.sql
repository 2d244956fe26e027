-- Picks of the selected evaluation runs, their answers and accuracies as stored.
-- grain: one row per run, selector, shot number and query
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   selector varchar: zero_shot, random, nearest, oracle, or the checkpoint's name
--   shots tinyint: number of demonstrations shown; 0 for zero_shot
--   pointer integer[]: ordered example ids of the demonstrations shown
--   prediction varchar: the answer after post-processing; null where the answerer failed
--   accuracy double: accuracy in [0, 1] by the task's metric; null where the answerer failed
--   correct tinyint: 1 where the metric calls the answer right, else 0
--   error varchar: why the answerer failed
--   scorer varchar: the model that answered
--   metric varchar: the metric that scored the row, with its version
with source as (select * from raw_evaluations),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        query_id::bigint as query_id,
        selector::varchar as selector,
        shots::tinyint as shots,
        pointer::integer[] as pointer,
        prediction::varchar as prediction,
        accuracy::double as accuracy,
        correct::tinyint as correct,
        error::varchar as error,
        scorer::varchar as scorer,
        metric::varchar as metric
    from source
)

select * from final
