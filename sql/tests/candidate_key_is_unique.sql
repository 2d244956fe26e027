-- A run holds each (query, ordinal) once.
select run, dataset, split, query_id, candidate, count(*) as num_rows
from stg_candidates
group by run, dataset, split, query_id, candidate
having count(*) > 1
