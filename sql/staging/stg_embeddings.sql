-- Embeddings of the selected runs as stored, every run.
-- grain: one row per run and example
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   name varchar: name of the embedding
--   example_id bigint: index of the item in its split
--   vector float[]: the embedding
with source as (select * from raw_embeddings),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        name::varchar as name,
        example_id::bigint as example_id,
        vector::float[] as vector
    from source
)

select * from final
