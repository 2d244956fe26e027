-- Questions that rollouts in rounds may ask about: those of folds 0 to 3.
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
with questions as (select * from folds),

final as (
    select dataset, split, query_id
    from questions
    where fold < 4
)

select * from final
