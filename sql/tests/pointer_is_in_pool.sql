-- Where a query has a pool, its pointers stay inside it and pointer_pos finds them there.
with pools as (
    select run, dataset, split, query_id, candidate_pool
    from stg_queries
    where candidate_pool is not null
)

select candidates.run, candidates.query_id, candidates.candidate, candidates.pointer
from stg_candidates as candidates
inner join pools using (run, dataset, split, query_id)
where
    not list_has_all(pools.candidate_pool, candidates.pointer)
    or (
        candidates.pointer_pos is not null
        and [pools.candidate_pool[position + 1] for position in candidates.pointer_pos]
        <> candidates.pointer
    )
