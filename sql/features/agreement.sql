-- How sure the annotators of the candidate are: the share of them that gave its answer.
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   agreement double: share of the candidate's annotators that gave its answer
with final as (
    select
        p.query,
        p.place,
        coalesce(a.share, 0)::double as agreement
    from pool_pairs as p
    left join pool_answers as a
        on p.query = a.query and p.place = a.place and p.answer = a.answer
)

select * from final
