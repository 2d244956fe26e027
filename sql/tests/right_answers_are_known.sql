-- Answers that a run calls right are among the annotators', where no question id tells which they are.
with answered as (
    select run, dataset, split, query_id, min(answer) as said
    from stg_candidates
    where score > 0 and answer <> '' and eval_failed is not true
    group by run, dataset, split, query_id
),

unnamed as (
    select answered.*
    from answered
    anti join (select * from stg_queries where question_id is not null) as named
        using (run, dataset, split, query_id)
),

compared as (
    select unnamed.run, fallback_match(unnamed.said, examples.answers) > 0 as is_known
    from unnamed
    inner join examples
        on
            unnamed.dataset = examples.dataset
            and unnamed.split = examples.split
            and unnamed.query_id = examples.example_id
    where len(examples.answers) > 0
)

select run, count(*) as num_right, count(*) filter (where is_known) as num_known
from compared
group by run
having count(*) >= 10 and count(*) filter (where is_known) < 0.5 * count(*)
