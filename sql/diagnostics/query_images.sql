-- Which image each query is about: what several questions on one image share makes them succeed and
-- fail together, so intervals draw whole images.
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   image_id varchar: id of its image; null where nothing stored tells it
with from_examples as (
    select dataset, split, example_id as query_id, image_id
    from examples
),

from_queries as (
    select dataset, split, query_id, image_id
    from queries
),

final as (
    select
        dataset,
        split,
        query_id,
        coalesce(from_queries.image_id, from_examples.image_id) as image_id
    from from_queries
    full outer join from_examples using (dataset, split, query_id)
)

select * from final
