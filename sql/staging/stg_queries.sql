-- Queries of the selected runs as stored, every run.
-- grain: one row per run and query
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   question_id varchar: id of the question in the official files
--   image_id varchar: id of its image
--   question varchar: the question
--   gt_answers varchar[]: the annotators' answers
--   candidate_pool integer[]: example ids the query may be shown; null means the shared pool
--   extra varchar: JSON object of keys lever does not know
with source as (select * from raw_queries),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        query_id::bigint as query_id,
        question_id::varchar as question_id,
        image_id::varchar as image_id,
        question::varchar as question,
        gt_answers::varchar[] as gt_answers,
        candidate_pool::integer[] as candidate_pool,
        extra::varchar as extra
    from source
)

select * from final
