-- Five folds of the questions by their text, so that no two questions with the same words fall into
-- different ones: recipes are chosen and rounds are judged on questions that taught nothing.
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   fold integer: 0 to 4, a function of the question's words alone
with worded as (
    select
        dataset,
        split,
        example_id as query_id,
        trim(regexp_replace(lower(question), '[^a-z0-9]+', ' ', 'g')) as words
    from examples
),

final as (
    select
        dataset,
        split,
        query_id,
        ('0x' || left(md5(words), 7))::integer % 5 as fold
    from worded
)

select * from final
