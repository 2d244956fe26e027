-- The rewards of each source within each mixed query, a source being a generation method, a
-- temperature, a beam rank or a number of demonstrations.
-- grain: one row per mixed query, dimension and source
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   dimension varchar: gen_method, temperature, beam_rank or shot_num: the column that is set
--   gen_method varchar: the source, where the dimension is this
--   temperature double: the source, where the dimension is this
--   beam_rank integer: the source, where the dimension is this
--   shot_num tinyint: the source, where the dimension is this
--   num_candidates bigint: candidates of the source
--   reward_variance double: population variance of their rewards
--   is_needed boolean: without this source the rewards of the query would all be equal
with mixed as (
    select dataset, split, query_id, min_reward, max_reward
    from query_rewards
    where class = 'mixed'
),

figures as (
    select
        scores.dataset,
        scores.split,
        scores.query_id,
        any_value(mixed.min_reward) as query_low,
        any_value(mixed.max_reward) as query_high,
        case
            when grouping(scores.gen_method) = 0 then 'gen_method'
            when grouping(scores.temperature) = 0 then 'temperature'
            when grouping(scores.beam_rank) = 0 then 'beam_rank'
            else 'shot_num'
        end as dimension,
        scores.gen_method,
        scores.temperature,
        scores.beam_rank,
        scores.shot_num,
        count(*) as num_candidates,
        var_pop(scores.reward) as reward_variance,
        min(scores.reward) as low,
        max(scores.reward) as high
    from scores
    inner join mixed using (dataset, split, query_id)
    group by grouping sets (
        (scores.dataset, scores.split, scores.query_id, scores.gen_method),
        (scores.dataset, scores.split, scores.query_id, scores.temperature),
        (scores.dataset, scores.split, scores.query_id, scores.beam_rank),
        (scores.dataset, scores.split, scores.query_id, scores.shot_num)
    )
),

-- The smallest and largest reward of the *other* sources follow from the two smallest and the two
-- largest per query, which is cheaper than comparing every source with every other.
extremes as (
    select
        dataset,
        split,
        query_id,
        dimension,
        count(*) filter (where low = query_low) as num_low,
        count(*) filter (where high = query_high) as num_high,
        min(low) filter (where low > query_low) as second_low,
        max(high) filter (where high < query_high) as second_high
    from figures
    group by dataset, split, query_id, dimension
),

others as (
    select
        figures.*,
        case when figures.low > figures.query_low or extremes.num_low > 1
            then figures.query_low else extremes.second_low
        end as others_low,
        case when figures.high < figures.query_high or extremes.num_high > 1
            then figures.query_high else extremes.second_high
        end as others_high
    from figures
    inner join extremes using (dataset, split, query_id, dimension)
),

final as (
    select
        dataset,
        split,
        query_id,
        dimension,
        gen_method,
        temperature,
        beam_rank,
        shot_num,
        num_candidates,
        reward_variance,
        others_low is null or others_low = others_high as is_needed
    from others
)

select * from final
