-- Every reward mode on the same candidates (mode_rewards): how many queries tie, how far the rewards
-- spread, and whether the order is that of hard_plus_soft.
-- grain: one row per reward mode, and one for a reward of the user's own
-- columns:
--   reward_mode varchar: the mode, or the user's expression
--   num_queries bigint: queries
--   tied_share double: share of them whose rewards are all equal
--   mean_deviation double: mean over queries of the population standard deviation
--   right_wrong_gap double: mean reward of right candidates minus that of wrong ones
--   rank_agreement double: Kendall's tau-b with hard_plus_soft over the pairs within a query
with long as (select * from mode_rewards),

spread as (
    select
        mode,
        any_value(reward_mode) as reward_mode,
        stddev_pop(reward) as deviation,
        min(reward) = max(reward) as is_tied
    from long
    group by mode, query
),

spreads as (
    select
        mode,
        any_value(reward_mode) as reward_mode,
        count(*) as num_queries,
        avg(is_tied::integer) as tied_share,
        avg(deviation) as mean_deviation
    from spread
    group by mode
),

gaps as (
    select
        mode,
        avg(reward) filter (where correct = 1) - avg(reward) filter (where correct = 0)
            as right_wrong_gap
    from long
    group by mode
),

-- Candidates of one query with equal rewards in both modes agree in nothing and differ in nothing:
-- as one row with their number they make a tenth of the pairs.
tied as (
    select mode, query, reward, default_reward, count(*) as num_candidates
    from long
    group by mode, query, reward, default_reward
),

pairs as (
    select
        a.mode,
        a.num_candidates * b.num_candidates as num_pairs,
        sign(a.reward - b.reward) as by_mode,
        sign(a.default_reward - b.default_reward) as by_default
    from tied as a
    inner join tied as b using (mode, query)
    where
        a.reward < b.reward
        or (a.reward = b.reward and a.default_reward < b.default_reward)
),

agreements as (
    select
        mode,
        sum(num_pairs * by_mode * by_default)
        / nullif(sqrt(sum(num_pairs * abs(by_mode)) * sum(num_pairs * abs(by_default))), 0)
            as rank_agreement
    from pairs
    group by mode
),

final as (
    select
        spreads.reward_mode,
        spreads.num_queries,
        spreads.tied_share,
        spreads.mean_deviation,
        gaps.right_wrong_gap,
        agreements.rank_agreement
    from spreads
    inner join gaps using (mode)
    left join agreements using (mode)
    order by spreads.reward_mode
)

select * from final
