-- Cosine of query and candidate in the space `question`.
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   cosine_question double: the cosine
--   gap_question double: the cosine less the highest of the pool
with final as (
    select
        query,
        place,
        cosine__question__question as cosine_question,
        cosine__question__question - max(cosine__question__question) over (partition by query) as gap_question
    from pool_pairs
)

select * from final
