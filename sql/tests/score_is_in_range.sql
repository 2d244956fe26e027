-- Scores are fractions, vqa_correct is 0 or 1, temperatures and beam ranks not
-- negative, log-probabilities not positive (but for rounding).
select
    run,
    query_id,
    candidate,
    vqa_correct,
    vqa_acc_score,
    vqa_gt_prob,
    vqa_rel_token_f1,
    vqa_rel_edit_sim,
    vqa_rel_score,
    temperature,
    beam_rank,
    logprob_score
from stg_candidates
where
    vqa_correct not in (0, 1)
    or vqa_acc_score not between 0 and 1
    or vqa_gt_prob not between 0 and 1
    or vqa_rel_token_f1 not between 0 and 1
    or vqa_rel_edit_sim not between 0 and 1
    or vqa_rel_score not between 0 and 1
    or temperature < 0
    or beam_rank < 0
    or logprob_score > 1e-4
