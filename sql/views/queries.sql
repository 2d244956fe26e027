-- Queries of the RL runs; of a query that several runs hold, the newest counts.
-- grain: one row per query
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
with stored as (select * from stg_queries),

compared as (
    select
        stored.*,
        runs.run_order,
        max(runs.run_order) over (partition by stored.dataset, stored.split, stored.query_id) as newest
    from stored
    inner join runs on stored.run = runs.run
),

final as (
    select
        run,
        dataset,
        split,
        query_id,
        question_id,
        image_id,
        question,
        gt_answers,
        candidate_pool,
        extra
    from compared
    where run_order = newest
)

select * from final
