-- Cells of the selected sweeps as stored.
-- grain: one row per run and cell
-- columns:
--   run varchar: id of the run the row is stored in
--   sweep varchar: name of the sweep
--   cell varchar: digest of everything the cell depends on
--   settings varchar: JSON object: what differs between the cells
--   accuracy double: accuracy in [0, 1] by the task's metric, mean over queries and shot numbers
--   low double: lower end of its 95 % bootstrap interval
--   high double: upper end
--   difference double: accuracy minus that of the SFT model, paired by query; null without one
--   difference_low double: lower end of its 95 % bootstrap interval
--   difference_high double: upper end
--   num_queries bigint: queries it was judged on
--   evaluation varchar: run of its evaluation
--   checkpoint varchar: file of the trained selector
with source as (select * from raw_sweeps),

final as (
    select
        run::varchar as run,
        sweep::varchar as sweep,
        cell::varchar as cell,
        settings::varchar as settings,
        accuracy::double as accuracy,
        low::double as low,
        high::double as high,
        difference::double as difference,
        difference_low::double as difference_low,
        difference_high::double as difference_high,
        num_queries::bigint as num_queries,
        evaluation::varchar as evaluation,
        checkpoint::varchar as checkpoint
    from source
)

select * from final
