-- Cosine of query and candidate in the space `both`.
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   cosine_both double: the cosine
--   gap_both double: the cosine less the highest of the pool
with final as (
    select
        query,
        place,
        cosine__both__both as cosine_both,
        cosine__both__both - max(cosine__both__both) over (partition by query) as gap_both
    from pool_pairs
)

select * from final
