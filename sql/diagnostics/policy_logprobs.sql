-- The policy that importance_weights asks about: the stored one at temperature 1, as far as its
-- log-probabilities are known. `lever audit --policy RELATION` puts another in its place.
-- grain: one row per query and ordered pointer
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   pointer integer[]: ordered example ids of the demonstrations
--   logprob double: log-probability of the pointer under the policy, in nats
with source as (select * from scored_sample),

final as (
    select
        dataset,
        split,
        query_id,
        pointer,
        max(logprob_score) as logprob
    from source
    where logprob_score is not null and (temperature is null or temperature = 1)
    group by dataset, split, query_id, pointer
)

select * from final
