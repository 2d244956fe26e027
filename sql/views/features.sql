-- Features of pairs of query and candidate, as trainings and evaluations computed them; where
-- several runs hold a name for a split, the newest run counts, whole.
-- grain: one row per dataset, split, query, example and name
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the query in its split
--   example_id bigint: the candidate
--   name varchar: the feature
--   value float: its value
with stored as (select * from stg_features),

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
        query_id,
        example_id,
        name,
        value
    from compared
    where run_order = newest
)

select * from final
