-- Dataset items of the selected runs as stored, every run.
-- grain: one row per run and example
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
with source as (select * from raw_examples),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        example_id::bigint as example_id,
        question_id::varchar as question_id,
        image_id::varchar as image_id,
        image_path::varchar as image_path,
        question::varchar as question,
        answers::varchar[] as answers,
        answer::varchar as answer,
        extra::varchar as extra
    from source
)

select * from final
