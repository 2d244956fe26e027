-- Texts of items in the selected runs as stored, every run.
-- grain: one row per run and example
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the item belongs to
--   split varchar: split the item belongs to
--   name varchar: what the text is of the item
--   example_id bigint: index of the item in its split
--   text varchar: the text
with source as (select * from raw_texts),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        name::varchar as name,
        example_id::bigint as example_id,
        text::varchar as text
    from source
)

select * from final
