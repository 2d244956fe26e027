-- How many of the drawn candidates of scored_sample are worth anything under the policy of
-- policy_logprobs: weights w = exp(policy's log-probability - log-probability when drawn), and
-- their effective sample size (sum w)^2 / sum w^2 per query (Kong 1992). Beams are not drawn.
-- grain: one row per generation method and temperature
-- columns:
--   gen_method varchar: the source the candidates were drawn from
--   temperature double: the temperature they were drawn at
--   num_drawn bigint: drawn candidates with a log-probability
--   num_weighted bigint: those the policy knows a log-probability for
--   num_queries bigint: queries with a weighted candidate
--   effective_size double: mean over queries of the effective sample size
--   effective_share double: mean over queries of that size / weighted candidates
with drawn as (
    select dataset, split, query_id, pointer, gen_method, temperature, logprob_score
    from scored_sample
    where logprob_score is not null and temperature is not null
),

weighted as (
    select
        drawn.dataset,
        drawn.split,
        drawn.query_id,
        drawn.gen_method,
        drawn.temperature,
        policy_logprobs.logprob - drawn.logprob_score as log_weight
    from drawn
    left join policy_logprobs using (dataset, split, query_id, pointer)
),

-- Divided by the query's largest weight, so that exp cannot overflow.
scaled as (
    select
        *,
        exp(
            log_weight
            - max(log_weight) over (partition by dataset, split, query_id, gen_method, temperature)
        ) as weight
    from weighted
),

queries as (
    select
        gen_method,
        temperature,
        count(*) as num_drawn,
        count(weight) as num_weighted,
        sum(weight) ** 2 / sum(weight ** 2) as effective_size
    from scaled
    group by dataset, split, query_id, gen_method, temperature
),

final as (
    select
        gen_method,
        temperature,
        sum(num_drawn)::bigint as num_drawn,
        sum(num_weighted)::bigint as num_weighted,
        count(effective_size) as num_queries,
        avg(effective_size) as effective_size,
        avg(effective_size / num_weighted) filter (where num_weighted > 0) as effective_share
    from queries
    group by gen_method, temperature
    order by gen_method, temperature
)

select * from final
