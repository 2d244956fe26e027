-- Texts of items by name, such as the words of their pictures; where several runs hold a name for a
-- split, the newest run counts, whole.
-- grain: one row per dataset, split, name and example
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the item belongs to
--   split varchar: split the item belongs to
--   name varchar: what the text is of the item
--   example_id bigint: index of the item in its split
--   text varchar: the text
with stored as (select * from stg_texts),

compared as (
    select
        stored.*,
        runs.run_order,
        max(runs.run_order) over (partition by stored.dataset, stored.split, stored.name) as newest
    from stored
    inner join runs on stored.run = runs.run
),

final as (
    select
        run,
        dataset,
        split,
        name,
        example_id,
        text
    from compared
    where run_order = newest
)

select * from final
