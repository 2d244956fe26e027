-- Every candidate once: of the same query, ordered pointer and scorer (an unknown scorer equals
-- any) the best scored run counts, and of equally scored ones the newest. The official metric
-- (and a score of unknown mode) beats string matching, which beats a failed evaluation. Failed
-- evaluations are included. Only queries that several runs hold are compared.
-- grain: one row per stored candidate that no newer run holds
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
--   answer varchar: the answer after post-processing
--   generation varchar: the answer as generated
--   correct tinyint: 1 where the metric calls the answer right, else 0
--   score double: of the task's metric, in [0, 1]
--   expected_score double: expected score under the model, in [0, 1]
--   token_f1 double: token F1 to the nearest ground truth in [0, 1]
--   edit_sim double: edit similarity to the nearest ground truth in [0, 1]
--   similarity double: similarity to the ground truth in [0, 1]
--   info_score double: InfoScore in nats
--   shot_scores struct(shot tinyint, correct tinyint, score double, expected_score double, answer varchar, eval_mode varchar)[]: scores of every prefix of the pointer
--   scorer varchar: the model that answered; null where unknown
--   metric varchar: the metric that scored the row, with its version
--   policy varchar: what proposed the candidate
--   extra varchar: JSON object of keys lever does not know
with stored as not materialized (
    select stg_candidates.*
    from stg_candidates
    where
        chosen_scorer() is null
        or stg_candidates.scorer is null
        or stg_candidates.scorer = chosen_scorer()
),

alone as not materialized (
    select stored.* from stored
    where not is_contested(stored.run)
),

contested as not materialized (
    select stored.*, runs.run_order
    from stored
    inner join runs on stored.run = runs.run
    where is_contested(stored.run)
),

shared_queries as not materialized (
    select dataset, split, query_id
    from contested
    group by dataset, split, query_id
    having min(run_order) <> max(run_order)
),

unshared as (
    select contested.* exclude (run_order)
    from contested
    anti join shared_queries using (dataset, split, query_id)
),

-- a newer run is worth more, a better kind of score more than any newer run
worth as (
    select
        contested.* exclude (run_order),
        max(
            run_order + case
                when eval_failed then 0
                when eval_mode = 'fallback' then 1000000000
                else 2000000000
            end
        ) over (partition by dataset, split, query_id, pointer, scorer, run_order) as run_worth
    from contested
    semi join shared_queries using (dataset, split, query_id)
),

compared as (
    select
        worth.*,
        max(run_worth) over (partition by dataset, split, query_id, pointer) as best,
        max(run_worth) over (partition by dataset, split, query_id, pointer, scorer) as best_same,
        max(case when scorer is null then run_worth end)
            over (partition by dataset, split, query_id, pointer) as best_unknown
    from worth
),

best as (
    select compared.* exclude (run_worth, best, best_same, best_unknown)
    from compared
    where
        case
            when scorer is null then run_worth = best
            else run_worth = best_same and run_worth >= coalesce(best_unknown, 0)
        end
),

final as (
    select * from alone
    union all
    select * from unshared
    union all
    select * from best
)

select
    run,
    dataset,
    split,
    query_id,
    candidate,
    shot_num,
    pointer,
    pointer_pos,
    gen_method,
    beam_rank,
    beam_score,
    logprob_score,
    temperature,
    eval_mode,
    eval_split,
    eval_failed,
    error,
    answer,
    generation,
    correct,
    score,
    expected_score,
    token_f1,
    edit_sim,
    similarity,
    info_score,
    shot_scores,
    scorer,
    metric,
    policy,
    extra
from final
