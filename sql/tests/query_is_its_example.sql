-- A query is the question of the example of its number; else its pointers are read as others, too.
select
    queries.run,
    queries.dataset,
    queries.split,
    queries.query_id,
    queries.question_id as question_in_run,
    examples.question_id as question_in_examples
from stg_queries as queries
inner join examples
    on
        queries.dataset = examples.dataset
        and queries.split = examples.split
        and queries.query_id = examples.example_id
where queries.question_id <> examples.question_id
