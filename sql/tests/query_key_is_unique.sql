-- A run holds each query once.
select run, dataset, split, query_id, count(*) as num_rows
from stg_queries
group by run, dataset, split, query_id
having count(*) > 1
