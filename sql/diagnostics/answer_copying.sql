-- How often the model just repeats the answer of a demonstration, in scored_sample. Demonstrations
-- are looked up among the dataset's training items, else among the items of the query's own split.
-- grain: one row per generation method with known demonstrations
-- columns:
--   gen_method varchar: beam, sample, random, retrieval or empty; null: not known
--   num_candidates bigint: candidates with an answer whose demonstrations are all known
--   copied_share double: share whose answer equals that of a demonstration (lower case, stripped)
--   copied_mean_reward double: mean reward of those
--   other_mean_reward double: mean reward of the rest
with shown as (
    select
        dataset,
        split,
        example_id,
        lower(trim(answer)) as answer,
        max((split = 'train')::integer) over (partition by dataset) as has_train
    from examples
    where answer is not null
),

picks as (
    select
        run,
        dataset,
        split,
        query_id,
        candidate,
        gen_method,
        shot_num,
        reward,
        lower(trim(answer)) as prediction,
        unnest(pointer) as example_id
    from scored_sample
    where answer is not null
),

answered as (
    select
        picks.gen_method,
        picks.reward,
        bool_or(picks.prediction = shown.answer) as is_copied
    from picks
    inner join shown
        on
            picks.dataset = shown.dataset
            and picks.example_id = shown.example_id
            and shown.split = case when shown.has_train = 1 then 'train' else picks.split end
    group by
        picks.run,
        picks.dataset,
        picks.split,
        picks.query_id,
        picks.candidate,
        picks.gen_method,
        picks.shot_num,
        picks.reward
    having count(*) = picks.shot_num
),

final as (
    select
        gen_method,
        count(*) as num_candidates,
        avg(is_copied::integer) as copied_share,
        avg(reward) filter (where is_copied) as copied_mean_reward,
        avg(reward) filter (where not is_copied) as other_mean_reward
    from answered
    group by gen_method
    order by gen_method
)

select * from final
