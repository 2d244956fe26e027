-- Cosine of query and candidate in the space `picture`.
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   cosine_picture double: the cosine
--   gap_picture double: the cosine less the highest of the pool
with final as (
    select
        query,
        place,
        cosine__picture__picture as cosine_picture,
        cosine__picture__picture - max(cosine__picture__picture) over (partition by query) as gap_picture
    from pool_pairs
)

select * from final
