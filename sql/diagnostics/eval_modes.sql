-- How the candidates of the selected runs were scored, failures and what the view leaves out
-- included, of the datasets and splits that the view holds, and how often string
-- match would have judged otherwise than the official metric, where both can be computed (official
-- rows of scored_sample whose annotators' answers are in the store).
-- grain: one row per run and generation method
-- columns:
--   run varchar: id of the run the candidates are stored in
--   gen_method varchar: beam, sample, random, retrieval or empty; null: not known
--   num_candidates bigint: candidates
--   num_file bigint: scored by the official metric
--   num_fallback bigint: scored by string match
--   num_unknown bigint: not known how
--   num_failed bigint: evaluation failed; counted here and in none of the three above
--   num_missing bigint: not failed, but without correct or score, which count as 0
--   num_fallback_shots bigint: not failed, with a prefix (shot_scores) scored by string match
--   num_compared bigint: sampled official rows for which string match can be computed
--   verdict_differs_share double: share of those where one says right and the other wrong
--   accuracy_differs_share double: share of those where the accuracies differ
with source as (select * from candidates),

-- By what is asked of a row first: a third of the time of asking every row by every count.
kinds as (
    select
        run,
        dataset,
        split,
        gen_method,
        eval_mode,
        coalesce(eval_failed, false) as is_failed,
        correct is null or score is null as is_missing,
        case
            when shot_scores is null then false
            else coalesce(list_contains([shot.eval_mode for shot in shot_scores], 'fallback'), false)
        end as has_fallback_shot,
        count(*) as num_candidates
    from source
    group by all
),

counts as (
    select
        run,
        gen_method,
        sum(num_candidates)::bigint as num_candidates,
        coalesce(sum(num_candidates) filter (where not is_failed and eval_mode = 'file'), 0)::bigint
            as num_file,
        coalesce(sum(num_candidates) filter (where not is_failed and eval_mode = 'fallback'), 0)::bigint
            as num_fallback,
        coalesce(sum(num_candidates) filter (where not is_failed and eval_mode is null), 0)::bigint
            as num_unknown,
        coalesce(sum(num_candidates) filter (where is_failed), 0)::bigint as num_failed,
        coalesce(sum(num_candidates) filter (where not is_failed and is_missing), 0)::bigint
            as num_missing,
        coalesce(sum(num_candidates) filter (where not is_failed and has_fallback_shot), 0)::bigint
            as num_fallback_shots
    from kinds
    semi join scored_places using (dataset, split)
    group by run, gen_method
),

matched as (
    select
        scored_sample.run,
        scored_sample.gen_method,
        scored_sample.score as official,
        coalesce(scored_sample.correct > 0, scored_sample.score > 0) as is_right,
        fallback_match(scored_sample.answer, query_answers.answers) as fallback
    from scored_sample
    inner join query_answers using (dataset, split, query_id)
    where
        scored_sample.eval_mode = 'file'
        and scored_sample.answer is not null
        and scored_sample.score is not null
),

disagreements as (
    select
        run,
        gen_method,
        count(*) as num_compared,
        avg((is_right <> (fallback > 0))::integer) as verdict_differs_share,
        avg((official <> fallback)::integer) as accuracy_differs_share
    from matched
    group by run, gen_method
),

final as (
    select
        counts.run,
        counts.gen_method,
        counts.num_candidates,
        counts.num_file,
        counts.num_fallback,
        counts.num_unknown,
        counts.num_failed,
        counts.num_missing,
        counts.num_fallback_shots,
        coalesce(disagreements.num_compared, 0) as num_compared,
        disagreements.verdict_differs_share,
        disagreements.accuracy_differs_share
    from counts
    left join disagreements
        on
            counts.run = disagreements.run
            and counts.gen_method is not distinct from disagreements.gen_method
    order by counts.run, counts.gen_method
)

select * from final
