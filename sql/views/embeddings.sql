-- Embeddings by name; where several runs hold a name for a split, the newest run counts, whole:
-- rows of two runs are vectors of two spaces.
-- grain: one row per dataset, split, name and example
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   name varchar: name of the embedding
--   example_id bigint: index of the item in its split
--   vector float[]: the embedding
with stored as (select * from stg_embeddings),

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
        vector
    from compared
    where run_order = newest
)

select * from final
