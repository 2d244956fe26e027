-- A pointer holds shot_num different example ids, none negative; an empty one shows nothing.
select run, query_id, candidate, shot_num, pointer
from stg_candidates
where
    len(pointer) <> shot_num
    or list_contains([example_id < 0 for example_id in pointer], true)
    or (len(pointer) > 1 and len(list_distinct(pointer)) <> len(pointer))
