-- Every candidate's query is in the same run.
select stg_candidates.run, stg_candidates.dataset, stg_candidates.split, stg_candidates.query_id
from stg_candidates
anti join stg_queries using (run, dataset, split, query_id)
group by all
