-- What every evaluated selector picked for every query, and how right the answer was.
-- grain: one row per run, selector, shot number and query
-- columns: as stg_evaluations
with stored as (select * from stg_evaluations),

final as (
    select
        run,
        dataset,
        split,
        query_id,
        selector,
        shots,
        pointer,
        prediction,
        accuracy,
        correct,
        error,
        scorer,
        metric
    from stored
)

select * from final
