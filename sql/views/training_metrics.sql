-- What trainings measured: losses, KL, gradient norms and validation, by step and by epoch.
-- grain: one row per run, phase, epoch, step and metric
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset that was trained on
--   split varchar: split that was trained on
--   phase varchar: sft, rce or grpo
--   epoch integer: from 1 within the phase
--   step bigint: batch number within the phase, from 0; null for a figure of the whole epoch
--   metric varchar: name of the metric
--   value double: its value; null where the batch made no step
with stored as (select * from stg_training_metrics),

final as (
    select
        stored.run,
        runs.dataset,
        runs.split,
        stored.phase,
        stored.epoch,
        stored.step,
        stored.metric,
        stored.value
    from stored
    inner join runs on stored.run = runs.run
)

select * from final
