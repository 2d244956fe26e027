-- Dataset items; of a split that several runs hold, the newest counts, whole.
-- grain: one row per example
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   example_id bigint: index of the item in its split
--   question_id varchar: id of the question in the official files
--   image_id varchar: id of its image
--   image_path varchar: image file, relative to the image root
--   question varchar: the question
--   answers varchar[]: the annotators' answers
--   answer varchar: the answer shown in a demonstration
--   extra varchar: JSON object of further fields that a template may show; null where it has none
with stored as (select * from stg_examples),

compared as (
    select
        stored.*,
        runs.run_order,
        max(runs.run_order) over (partition by stored.dataset, stored.split) as newest
    from stored
    inner join runs on stored.run = runs.run
),

final as (
    select
        run,
        dataset,
        split,
        example_id,
        question_id,
        image_id,
        image_path,
        question,
        answers,
        answer,
        extra
    from compared
    where run_order = newest
)

select * from final
