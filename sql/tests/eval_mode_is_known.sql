-- An evaluation mode is file, fallback or null.
select run, query_id, candidate, eval_mode
from stg_candidates
where eval_mode not in ('file', 'fallback')
