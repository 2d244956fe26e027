-- Tied queries of the training folds that another candidate may well untie: the likelier half.
-- The chance is that of n wrong (or right) ones in a row being followed by the other kind, with two
-- candidates of the usual rate in mind: (2 * rate) / (n + 2) after wrong ones.
-- grain: one row per query
-- columns:
--   dataset varchar: dataset the query belongs to
--   split varchar: split the query belongs to
--   query_id bigint: index of the question in its split
--   num_candidates bigint: scored candidates it has
--   chance double: that the next candidate differs from them, in [0, 1]
with scored as (
    select dataset, split, query_id, correct
    from all_candidates
    where correct is not null
),

rates as (
    select dataset, split, avg(correct) as rate
    from scored
    group by dataset, split
),

counted as (
    select
        dataset,
        split,
        query_id,
        count(*) as num_candidates,
        max(correct) as is_right
    from scored
    group by dataset, split, query_id
    having min(correct) = max(correct)
),

judged as (
    select
        counted.dataset,
        counted.split,
        counted.query_id,
        counted.num_candidates,
        2 * if(counted.is_right = 1, 1 - rates.rate, rates.rate) / (counted.num_candidates + 2)
            as chance
    from counted
    inner join rates using (dataset, split)
    inner join training_folds using (dataset, split, query_id)
),

ranked as (
    select
        *,
        percent_rank() over (partition by dataset, split order by chance desc, query_id) as place
    from judged
),

final as (
    select dataset, split, query_id, num_candidates, chance
    from ranked
    where place <= 0.5
)

select * from final
