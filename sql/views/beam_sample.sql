-- Candidates found by beam search or drawn by temperature sampling.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from all_candidates),

final as (
    select *
    from source
    where gen_method in ('beam', 'sample')
)

select * from final
