-- Features of pairs in the selected runs as stored, every run.
-- grain: one row per run, query, example and name
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the query in its split
--   example_id bigint: the candidate
--   name varchar: the feature
--   value float: its value
with source as (select * from raw_features),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        query_id::bigint as query_id,
        example_id::bigint as example_id,
        name::varchar as name,
        value::float as value
    from source
)

select * from final
