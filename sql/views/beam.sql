-- Candidates found by beam search.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from all_candidates),

final as (
    select *
    from source
    where gen_method = 'beam'
)

select * from final
