-- Cosine of the query, in the space `question`, with the candidate's answer.
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   cosine_answer double: the cosine
--   gap_answer double: the cosine less the highest of the pool
with final as (
    select
        query,
        place,
        cosine__question__answer as cosine_answer,
        cosine__question__answer - max(cosine__question__answer) over (partition by query) as gap_answer
    from pool_pairs
)

select * from final
