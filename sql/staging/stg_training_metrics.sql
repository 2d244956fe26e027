-- Metrics of the selected trainings as stored.
-- grain: one row per run, phase, epoch, step and metric
-- columns:
--   run varchar: id of the run the row is stored in
--   phase varchar: sft, rce or grpo
--   epoch integer: from 1 within the phase
--   step bigint: batch number within the phase, from 0; null for a figure of the whole epoch
--   metric varchar: name of the metric
--   value double: its value; null where the batch made no step
with source as (select * from raw_training_metrics),

final as (
    select
        run::varchar as run,
        phase::varchar as phase,
        epoch::integer as epoch,
        step::bigint as step,
        metric::varchar as metric,
        value::double as value
    from source
)

select * from final
