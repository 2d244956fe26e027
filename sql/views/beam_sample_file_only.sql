-- Beam and sampled candidates without the rows scored by string matching; an unknown evaluation
-- mode stays.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from beam_sample),

final as (
    select *
    from source
    where eval_mode is distinct from 'fallback'
)

select * from final
