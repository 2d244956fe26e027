-- all_candidates with names that fit any task beside the stored ones, which begin with vqa.
-- grain: one row per candidate
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   candidate integer: ordinal in the source, from 0
--   shot_num tinyint: number of demonstrations, the length of pointer
--   pointer integer[]: ordered example ids of the demonstrations
--   pointer_pos smallint[]: positions of the pointer in the candidate pool
--   gen_method varchar: beam, sample, random, retrieval or empty
--   beam_rank integer: 0 for the best beam
--   beam_score double: sum of the step probabilities
--   logprob_score double: sequence log-probability in nats, at temperature
--   temperature double: sampling temperature; null where not sampled
--   eval_mode varchar: file (official metric), fallback (string match) or null (unknown)
--   eval_split varchar: split whose annotations scored the row
--   eval_failed boolean: true where the answerer raised
--   error varchar: what it raised
--   vqa_pred_answer varchar: the answer after post-processing
--   vqa_raw_generation varchar: the answer as generated
--   vqa_correct tinyint: 1 where the accuracy is above 0, else 0
--   vqa_acc_score double: accuracy in [0, 1] by the task's metric
--   vqa_gt_prob double: expected accuracy under the model in [0, 1]
--   vqa_rel_token_f1 double: token F1 to the nearest ground truth in [0, 1]
--   vqa_rel_edit_sim double: edit similarity to the nearest ground truth in [0, 1]
--   vqa_rel_score double: similarity to the ground truth in [0, 1]
--   info_score double: InfoScore in nats
--   shot_scores struct(shot tinyint, vqa_correct tinyint, vqa_acc_score double, vqa_gt_prob double, vqa_pred_answer varchar, eval_mode varchar)[]: scores of every prefix of the pointer
--   scorer varchar: the model that answered; null where unknown
--   metric_version varchar: version of the metric that scored the row
--   policy varchar: what proposed the candidate
--   extra varchar: JSON object of keys lever does not know
--   answer varchar: vqa_pred_answer, the answer after post-processing
--   generation varchar: vqa_raw_generation, the answer as generated
--   correct tinyint: vqa_correct, 1 where the task's metric calls the answer right, else 0
--   score double: vqa_acc_score, the score of the task's metric in [0, 1]
--   expected_score double: vqa_gt_prob, the expected score under the model in [0, 1]
--   metric varchar: metric_version, the metric that scored the row
with source as (select * from all_candidates),

final as (
    select
        *,
        vqa_pred_answer as answer,
        vqa_raw_generation as generation,
        vqa_correct as correct,
        vqa_acc_score as score,
        vqa_gt_prob as expected_score,
        metric_version as metric
    from source
)

select * from final
