-- A run holds each example once.
select run, dataset, split, example_id, count(*) as num_rows
from stg_examples
group by run, dataset, split, example_id
having count(*) > 1
