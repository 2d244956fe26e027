-- How far the pool agrees with the candidate: every candidate votes for the answers of its
-- annotators, weighed by softmax(similarity / t) at t = 0.05, 0.1 and 0.2; the share of the votes
-- for the candidate's own answer, raw and as log(share + 0.001).
-- grain: one row per query and place
-- columns:
--   query integer: number of the query
--   place integer: place of the candidate in its pool
--   vote_05 double: share of the votes at t = 0.05
--   vote_10 double: share of the votes at t = 0.1
--   vote_20 double: share of the votes at t = 0.2
--   log_vote_05 double: logarithm of the share at t = 0.05
--   log_vote_10 double: logarithm of the share at t = 0.1
--   log_vote_20 double: logarithm of the share at t = 0.2
with weights as (
    select
        query,
        place,
        answer,
        similarity - max(similarity) over (partition by query) as gap
    from pool_pairs
),

votes as (
    select
        a.query,
        a.answer,
        sum(exp(w.gap / 0.05) * a.share) as v05,
        sum(exp(w.gap / 0.1) * a.share) as v10,
        sum(exp(w.gap / 0.2) * a.share) as v20
    from pool_answers as a
    inner join weights as w on a.query = w.query and a.place = w.place
    group by a.query, a.answer
),

totals as (
    select
        query,
        sum(v05) as t05,
        sum(v10) as t10,
        sum(v20) as t20
    from votes
    group by query
),

shares as (
    select
        w.query,
        w.place,
        coalesce(v.v05 / t.t05, 0) as vote_05,
        coalesce(v.v10 / t.t10, 0) as vote_10,
        coalesce(v.v20 / t.t20, 0) as vote_20
    from weights as w
    left join votes as v on w.query = v.query and w.answer = v.answer
    left join totals as t on w.query = t.query
),

final as (
    select
        query,
        place,
        vote_05,
        vote_10,
        vote_20,
        ln(vote_05 + 0.001) as log_vote_05,
        ln(vote_10 + 0.001) as log_vote_10,
        ln(vote_20 + 0.001) as log_vote_20
    from shares
)

select * from final
