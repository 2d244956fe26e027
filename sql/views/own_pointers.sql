-- Candidates whose pointer holds the query itself: the answer stands in the prompt. Left out of the
-- training views. Only the split train, whose pointers are items of itself.
-- grain: one row per candidate
-- columns: as candidates
with source as (select * from candidates),

final as (
    select *
    from source
    where split = 'train' and list_contains(pointer, query_id)
)

select * from final
