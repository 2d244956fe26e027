-- No pointer holds the query itself (its answer would stand in the prompt); views leave such rows out.
select run, query_id, candidate, pointer
from stg_candidates
where split = 'train' and list_contains(pointer, query_id)
