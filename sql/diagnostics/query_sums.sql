-- The sums of each query that its class and every mean of an audit follow from: how its rewards
-- spread, and what the policy would pick (beam rank 0, else the highest log-probability; the mean of
-- several).
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   num_candidates bigint: candidates
--   num_pointers bigint: distinct ordered pointers, told apart by a 64-bit hash
--   num_right bigint: candidates with correct 1
--   num_wrong bigint: candidates with correct 0
--   num_unscored bigint: candidates whose correct is null
--   num_fallback bigint: candidates scored by string match
--   num_unknown bigint: candidates of which is not known how they were scored
--   mean_reward double: mean reward
--   reward_variance double: population variance of the rewards; 0 for one candidate
--   min_reward double: smallest reward
--   max_reward double: largest reward
--   best_accuracy double: largest score
--   picked_reward double: reward of the policy's pick; null without rank and log-probability
--   picked_accuracy double: score of the policy's pick
with source as not materialized (select * from scores),

figures as (
    select
        dataset,
        split,
        query_id,
        count(*) as num_candidates,
        count(*) filter (where correct = 1) as num_right,
        count(*) filter (where correct = 0) as num_wrong,
        count(*) filter (where correct is null) as num_unscored,
        count(*) filter (where eval_mode = 'fallback') as num_fallback,
        count(*) filter (where eval_mode is null) as num_unknown,
        avg(reward) as mean_reward,
        var_pop(reward) as reward_variance,
        min(reward) as min_reward,
        max(reward) as max_reward,
        max(score) as best_accuracy,
        avg(reward) filter (where beam_rank = 0) as beam_reward,
        avg(score) filter (where beam_rank = 0) as beam_accuracy,
        max(logprob_score) as max_logprob
    from source
    group by dataset, split, query_id
),

without_beam as (
    select dataset, split, query_id, max_logprob
    from figures
    where beam_reward is null and max_logprob is not null
),

likeliest as (
    select
        source.dataset,
        source.split,
        source.query_id,
        avg(source.reward) as reward,
        avg(source.score) as accuracy
    from source
    inner join without_beam
        on
            source.dataset = without_beam.dataset
            and source.split = without_beam.split
            and source.query_id = without_beam.query_id
            and source.logprob_score = without_beam.max_logprob
    group by source.dataset, source.split, source.query_id
),

-- Looking for repeats by one hash first is half the work of counting distinct pointers per query.
repeated as (
    select hash(dataset, split, query_id, pointer) as pointer_key
    from source
    group by pointer_key
    having count(*) > 1
),

repeats as (
    select
        source.dataset,
        source.split,
        source.query_id,
        count(*) - count(distinct repeated.pointer_key) as num_repeats
    from source
    inner join repeated
        on
            hash(source.dataset, source.split, source.query_id, source.pointer)
            = repeated.pointer_key
    group by source.dataset, source.split, source.query_id
),

final as (
    select
        figures.dataset,
        figures.split,
        figures.query_id,
        figures.num_candidates,
        figures.num_candidates - coalesce(repeats.num_repeats, 0) as num_pointers,
        figures.num_right,
        figures.num_wrong,
        figures.num_unscored,
        figures.num_fallback,
        figures.num_unknown,
        figures.mean_reward,
        figures.reward_variance,
        figures.min_reward,
        figures.max_reward,
        figures.best_accuracy,
        coalesce(figures.beam_reward, likeliest.reward) as picked_reward,
        coalesce(figures.beam_accuracy, likeliest.accuracy) as picked_accuracy
    from figures
    left join likeliest using (dataset, split, query_id)
    left join repeats using (dataset, split, query_id)
)

select * from final
