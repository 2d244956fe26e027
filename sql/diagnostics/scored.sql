-- The candidates an audit looks at, with their reward: those of all_candidates, rewarded by
-- hard_plus_soft with weights 1. `lever audit` puts the chosen view, reward and runs in its place.
-- grain: one row per candidate
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   candidate integer: ordinal in the source, from 0
--   shot_num tinyint: number of demonstrations, the length of pointer
--   pointer integer[]: ordered example ids of the demonstrations
--   gen_method varchar: beam, sample, random, retrieval or empty
--   beam_rank integer: 0 for the best beam
--   beam_score double: sum of the step probabilities
--   logprob_score double: sequence log-probability in nats, at temperature
--   temperature double: sampling temperature; null where not sampled
--   eval_mode varchar: file (official metric), fallback (string match) or null (unknown)
--   answer varchar: the answer after post-processing
--   correct tinyint: 1 where the metric calls the answer right, else 0
--   score double: of the task's metric, in [0, 1]
--   expected_score double: expected score under the model, in [0, 1]
--   token_f1 double: token F1 to the nearest ground truth in [0, 1]
--   edit_sim double: edit similarity to the nearest ground truth in [0, 1]
--   similarity double: similarity to the ground truth in [0, 1]
--   info_score double: InfoScore in nats
--   shot_scores struct(shot tinyint, correct tinyint, score double, expected_score double, answer varchar, eval_mode varchar)[]: scores of every prefix of the pointer
--   reward double: the reward in [-5, 5]; a missing one is 0
with source as (select * from all_candidates),

final as (
    select
        run,
        dataset,
        split,
        query_id,
        candidate,
        shot_num,
        pointer,
        gen_method,
        beam_rank,
        beam_score,
        logprob_score,
        temperature,
        eval_mode,
        answer,
        correct,
        score,
        expected_score,
        token_f1,
        edit_sim,
        similarity,
        info_score,
        shot_scores,
        reward_clip(reward_hard_plus_soft(correct, score, 1.0::double, 1.0::double))
            as reward
    from source
)

select * from final
