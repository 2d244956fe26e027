-- The annotators' answers to each sampled query: from the query itself, else from the dataset's
-- items, whose index is the query id.
-- grain: one row per query of scored_sample with known answers
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   answers varchar[]: the annotators' answers
with sampled as (select distinct dataset, split, query_id from scored_sample),

asked as not materialized (
    select * from queries
    where query_id in (select query_id from sampled)
),

final as (
    select
        sampled.dataset,
        sampled.split,
        sampled.query_id,
        coalesce(asked.gt_answers, examples.answers) as answers
    from sampled
    left join asked using (dataset, split, query_id)
    left join examples
        on
            sampled.dataset = examples.dataset
            and sampled.split = examples.split
            and sampled.query_id = examples.example_id
    where coalesce(asked.gt_answers, examples.answers) is not null
)

select * from final
