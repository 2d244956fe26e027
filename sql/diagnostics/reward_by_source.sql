-- What each source of candidates contributes; the four reward_by_* relations are parts of it.
-- grain: one row per dimension and source
-- columns:
--   dimension varchar: gen_method, temperature, beam_rank or shot_num: the column that is set
--   gen_method varchar: the source, where the dimension is this
--   temperature double: the source, where the dimension is this
--   beam_rank integer: the source, where the dimension is this
--   shot_num tinyint: the source, where the dimension is this
--   num_candidates bigint: candidates of the source
--   right_share double: share of them with correct 1
--   mean_reward double: their mean reward
--   within_query_variance double: variance of their rewards around their mean in the query
--   num_queries_needing bigint: queries that are mixed only because of this source
with counts as (
    select
        case
            when grouping(gen_method) = 0 then 'gen_method'
            when grouping(temperature) = 0 then 'temperature'
            when grouping(beam_rank) = 0 then 'beam_rank'
            else 'shot_num'
        end as dimension,
        gen_method,
        temperature,
        beam_rank,
        shot_num,
        count(*) as num_candidates,
        count(*) filter (where correct = 1) / count(*) as right_share,
        avg(reward) as mean_reward
    from scores
    group by grouping sets ((gen_method), (temperature), (beam_rank), (shot_num))
),

spread as (
    select
        dimension,
        gen_method,
        temperature,
        beam_rank,
        shot_num,
        sum(num_candidates * reward_variance) as squares,
        count(*) filter (where is_needed) as num_queries_needing
    from source_rewards
    group by dimension, gen_method, temperature, beam_rank, shot_num
),

final as (
    select
        counts.dimension,
        counts.gen_method,
        counts.temperature,
        counts.beam_rank,
        counts.shot_num,
        counts.num_candidates,
        counts.right_share,
        counts.mean_reward,
        coalesce(spread.squares, 0) / counts.num_candidates as within_query_variance,
        coalesce(spread.num_queries_needing, 0) as num_queries_needing
    from counts
    left join spread
        on
            counts.dimension = spread.dimension
            and counts.gen_method is not distinct from spread.gen_method
            and counts.temperature is not distinct from spread.temperature
            and counts.beam_rank is not distinct from spread.beam_rank
            and counts.shot_num is not distinct from spread.shot_num
)

select * from final
