-- Mean accuracy of every evaluated selector at every shot number.
-- grain: one row per run, selector and shot number
-- columns:
--   run varchar: id of the evaluation run
--   dataset varchar: dataset of the queries
--   split varchar: split of the queries
--   selector varchar: zero_shot, random, nearest, oracle, or the checkpoint's name
--   shots tinyint: number of demonstrations shown; 0 for zero_shot
--   num_queries bigint: queries asked
--   num_failed bigint: queries the answerer failed on; not in the mean
--   mean_accuracy double: mean accuracy in [0, 1] by the task's metric
with stored as (select * from stg_evaluations),

final as (
    select
        run,
        dataset,
        split,
        selector,
        shots,
        count(*) as num_queries,
        count(*) filter (accuracy is null) as num_failed,
        round(avg(accuracy), 9) as mean_accuracy
    from stored
    group by run, dataset, split, selector, shots
)

select * from final
