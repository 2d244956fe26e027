-- How informative each candidate is for the reward mode hybrid: the InfoScore of the same query
-- and ordered pointer, else the beam score, min-max-normalised over the selected runs before any
-- filter. Null where neither is known.
-- grain: one row per run, query and candidate
-- columns:
--   run varchar: id of the run the row is stored in
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   candidate integer: ordinal in the source, from 0
--   info double: normalised InfoScore or beam score in [0, 1]
with stored as not materialized (select * from candidates),

scores as (
    select dataset, split, query_id, pointer, max(info_score) as info_score
    from beam_infoscore
    group by dataset, split, query_id, pointer
),

joined as not materialized (
    select
        stored.run,
        stored.dataset,
        stored.split,
        stored.query_id,
        stored.candidate,
        coalesce(scores.info_score, stored.info_score, stored.beam_score) as raw_info
    from stored
    left join scores
        on
            stored.dataset = scores.dataset
            and stored.split = scores.split
            and stored.query_id = scores.query_id
            and stored.pointer = scores.pointer
    where has_beams()
    -- without beams no pointer is looked up: a sixth of the time
    union all
    select
        run,
        dataset,
        split,
        query_id,
        candidate,
        coalesce(info_score, beam_score) as raw_info
    from stored
    where not has_beams()
),

bounds as (
    select min(raw_info) as low, max(raw_info) as high from joined
),

final as (
    select
        joined.run,
        joined.dataset,
        joined.split,
        joined.query_id,
        joined.candidate,
        case
            when joined.raw_info is null then null
            when bounds.high = bounds.low then 0.0::double
            else (joined.raw_info - bounds.low) / (bounds.high - bounds.low)
        end as info
    from joined
    cross join bounds
)

select * from final
