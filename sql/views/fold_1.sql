-- Questions of fold 1: a cell of a sweep trains without them and is judged on them.
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
with questions as (select * from folds),

final as (
    select dataset, split, query_id
    from questions
    where fold = 1
)

select * from final
