-- A query is the same question in every run.
select
    dataset,
    split,
    query_id,
    list_sort(list(distinct question_id)) as question_ids
from stg_queries
group by dataset, split, query_id
having count(distinct question_id) > 1
