-- InfoScore beam candidates of the selected beam runs as stored.
-- grain: one row per run, query and candidate
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
with source as (select * from raw_beams),

final as (
    select
        run::varchar as run,
        dataset::varchar as dataset,
        split::varchar as split,
        query_id::bigint as query_id,
        candidate::integer as candidate,
        shot_num::tinyint as shot_num,
        pointer::integer[] as pointer,
        pointer_pos::smallint[] as pointer_pos,
        gen_method::varchar as gen_method,
        beam_rank::integer as beam_rank,
        beam_score::double as beam_score,
        logprob_score::double as logprob_score,
        temperature::double as temperature,
        eval_mode::varchar as eval_mode,
        eval_split::varchar as eval_split,
        eval_failed::boolean as eval_failed,
        error::varchar as error,
        answer::varchar as answer,
        generation::varchar as generation,
        correct::tinyint as correct,
        score::double as score,
        expected_score::double as expected_score,
        token_f1::double as token_f1,
        edit_sim::double as edit_sim,
        similarity::double as similarity,
        info_score::double as info_score,
        shot_scores::struct(shot tinyint, correct tinyint, score double, expected_score double, answer varchar, eval_mode varchar)[] as shot_scores,
        scorer::varchar as scorer,
        metric::varchar as metric,
        policy::varchar as policy,
        extra::varchar as extra
    from source
)

select * from final
