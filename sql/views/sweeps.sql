-- Cells of every sweep; of a cell that several runs of a sweep hold, the newest run counts.
-- grain: one row per sweep and cell
-- columns: as stg_sweeps
with stored as (select * from stg_sweeps),

compared as (
    select
        stored.*,
        runs.run_order,
        max(runs.run_order) over (partition by stored.sweep, stored.cell) as newest
    from stored
    inner join runs on stored.run = runs.run
),

final as (
    select
        run,
        sweep,
        cell,
        settings,
        accuracy,
        low,
        high,
        difference,
        difference_low,
        difference_high,
        num_queries,
        evaluation,
        checkpoint
    from compared
    where run_order = newest
)

select * from final
