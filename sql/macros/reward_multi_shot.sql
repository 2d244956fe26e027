-- Sum over k of w_k * (hard + soft of the first k demonstrations); no weights means equal ones.
-- A prefix without a score is an error: its reward is unknown, not 0.
-- reads:
--   shot_scores
-- largest: case when len(shot_weights) = 0 then 2
--   else list_sum([2 * greatest(w, 0) for w in shot_weights]) end
-- requires: list_sort([x.shot for x in shot_scores if x.correct is not null])
--   = range(1, len(pointer) + 1)
--   and (len(shot_weights) = 0 or len(pointer) <= len(shot_weights))
create or replace macro reward_multi_shot(shot_scores, pointer, shot_weights) as
    case
        when len(coalesce(shot_scores, [])) <> len(pointer)
            or list_sort([s.shot for s in shot_scores]) <> range(1, len(pointer) + 1)
            then error('shot_scores lack a prefix of the pointer ' || pointer::varchar)
        when len(shot_weights) > 0 and len(shot_weights) < len(pointer)
            then error('there are fewer shot weights than demonstrations in ' || pointer::varchar)
        when list_contains([s.correct is null for s in shot_scores], true)
            then error('shot_scores hold an unscored prefix of the pointer ' || pointer::varchar)
        else list_sum([
            (case when len(shot_weights) = 0 then 1.0::double / len(pointer) else shot_weights[s.shot] end)
            * (s.correct::double + coalesce(s.score, 0)::double)
            for s in shot_scores
        ])
    end;
