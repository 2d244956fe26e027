-- Every reward mode on the same candidates (scored_sample), at the weights of audit_settings: how
-- many queries tie, how far the rewards spread, and whether the order is that of hard_plus_soft.
-- Modes whose columns are null throughout are left out, and so are legacy with both weights 0 and
-- multi_shot where a prefix of some pointer has no score or no weight.
-- grain: one row per reward mode, and one for a reward of the user's own
-- columns:
--   reward_mode varchar: the mode, or the user's expression
--   num_queries bigint: queries
--   tied_share double: share of them whose rewards are all equal
--   mean_deviation double: mean over queries of the population standard deviation
--   right_wrong_gap double: mean reward of right candidates minus that of wrong ones
--   rank_agreement double: Kendall's tau-b with hard_plus_soft over the pairs within a query
with settings as (select * from audit_settings),

known as (
    select
        count(v.vqa_correct) > 0 as has_hard,
        count(v.vqa_acc_score) > 0 as has_soft,
        count(v.vqa_gt_prob) > 0 as has_gt,
        count(v.vqa_rel_score) > 0 as has_rel,
        bool_and(
            coalesce(
                list_sort([x.shot for x in v.shot_scores if x.vqa_correct is not null])
                = range(1, len(v.pointer) + 1),
                false
            )
            and (len(settings.shot_weights) = 0 or len(v.pointer) <= len(settings.shot_weights))
        ) as has_shots,
        count(v.beam_score) > 0 or count(v.logprob_score) > 0 as has_quality
    from scored_sample as v
    cross join settings
),

-- Numbers for texts: everything below groups and joins by them.
source as (
    select
        v.*,
        candidate_info.info,
        dense_rank() over (order by v.dataset, v.split, v.query_id) as query,
        row_number() over () as item
    from scored_sample as v
    left join candidate_info using (run, dataset, split, query_id, candidate)
),

modes as (
    select
        unnest([
            'hard_plus_soft',
            'hard_plus_soft_v2',
            'separated',
            'hard_only',
            'soft_only',
            'hard01_plus_gtprob',
            'hard01_plus_gtprob_separated',
            'hard_plus_gtprob_plus_rel',
            'hybrid',
            'legacy',
            'multi_shot',
            settings.reward_name
        ]) as reward_mode,
        unnest(range(12)) as mode
    from settings
),

-- One reward for each of these modes, in their order.
wide as (
    select
        v.query,
        v.item,
        v.vqa_correct,
        reward_clip(reward_hard_plus_soft(
            v.vqa_correct, v.vqa_acc_score, s.hard_weight, s.soft_weight
        )) as default_reward,
        unnest(range(12)) as mode,
        unnest([
            case when k.has_hard or k.has_soft then
                reward_hard_plus_soft(v.vqa_correct, v.vqa_acc_score, s.hard_weight, s.soft_weight)
            end,
            case when k.has_hard and k.has_soft then
                reward_hard_plus_soft_v2(
                    v.vqa_correct, v.vqa_acc_score, s.hard_weight, s.soft_weight
                )
            end,
            case when k.has_hard and k.has_soft then
                reward_separated(v.vqa_correct, v.vqa_acc_score, s.hard_weight, s.soft_weight)
            end,
            case when k.has_hard then reward_hard_only(v.vqa_correct, s.hard_weight) end,
            case when k.has_soft then reward_soft_only(v.vqa_acc_score, s.soft_weight) end,
            case when k.has_hard and k.has_gt then
                reward_hard01_plus_gtprob(
                    v.vqa_correct, v.vqa_gt_prob, s.hard_weight, s.soft_weight
                )
            end,
            case when k.has_hard and k.has_gt then
                reward_hard01_plus_gtprob_separated(
                    v.vqa_correct, v.vqa_gt_prob, s.hard_weight, s.soft_weight
                )
            end,
            case when k.has_hard and k.has_gt and k.has_rel then
                reward_hard_plus_gtprob_plus_rel(
                    v.vqa_correct, v.vqa_gt_prob, v.vqa_rel_score,
                    s.hard_weight, s.soft_weight, s.rel_weight
                )
            end,
            case when v.info is not null then
                reward_hybrid(v.info, v.vqa_correct, v.vqa_acc_score, s.hybrid_alpha)
            end,
            case when k.has_quality and (s.reward_alpha <> 0 or s.reward_beta <> 0) then
                reward_legacy(
                    v.beam_score, v.logprob_score, v.vqa_correct, v.vqa_acc_score,
                    s.reward_alpha, s.reward_beta, s.correctness_mode, s.use_logprob
                )
            end,
            case when k.has_shots then
                reward_multi_shot(v.shot_scores, v.pointer, s.shot_weights)
            end,
            case when s.is_expression then v.reward end
        ]) as reward
    from source as v
    cross join settings as s
    cross join known as k
),

long as (
    select query, item, mode, vqa_correct, default_reward, reward_clip(reward) as reward
    from wide
    where reward is not null
),

spread as (
    select mode, stddev_pop(reward) as deviation, min(reward) = max(reward) as is_tied
    from long
    group by mode, query
),

spreads as (
    select
        mode,
        count(*) as num_queries,
        avg(is_tied::integer) as tied_share,
        avg(deviation) as mean_deviation
    from spread
    group by mode
),

gaps as (
    select
        mode,
        avg(reward) filter (where vqa_correct = 1) - avg(reward) filter (where vqa_correct = 0)
            as right_wrong_gap
    from long
    group by mode
),

pairs as (
    select
        a.mode,
        sign(a.reward - b.reward) as by_mode,
        sign(a.default_reward - b.default_reward) as by_default
    from long as a
    inner join long as b using (mode, query)
    where a.item < b.item
),

agreements as (
    select
        mode,
        sum(by_mode * by_default)
        / nullif(sqrt(sum(abs(by_mode)) * sum(abs(by_default))), 0) as rank_agreement
    from pairs
    group by mode
),

final as (
    select
        modes.reward_mode,
        spreads.num_queries,
        spreads.tied_share,
        spreads.mean_deviation,
        gaps.right_wrong_gap,
        agreements.rank_agreement
    from spreads
    inner join modes using (mode)
    inner join gaps using (mode)
    left join agreements using (mode)
    order by modes.reward_mode
)

select * from final
