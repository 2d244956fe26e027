-- Accuracy by string match: 1 where the prediction equals an answer (lower case, stripped), 0.5
-- where one contains the other, else 0. The empty string matches nothing. The same rule as
-- `fallback_match` in Python, which scores new answers; null where either side is null.
create or replace macro fallback_match(prediction, answers) as
    case
        when prediction is null or answers is null then null
        when trim(prediction, e' \t\n\r\f\v') = '' then 0.0::double
        when list_contains(
            [lower(trim(a, e' \t\n\r\f\v')) for a in answers],
            lower(trim(prediction, e' \t\n\r\f\v'))
        ) then 1.0::double
        when len([
            a for a in answers
            if trim(a, e' \t\n\r\f\v') <> ''
            and (
                contains(
                    lower(trim(a, e' \t\n\r\f\v')), lower(trim(prediction, e' \t\n\r\f\v'))
                )
                or contains(
                    lower(trim(prediction, e' \t\n\r\f\v')), lower(trim(a, e' \t\n\r\f\v'))
                )
            )
        ]) > 0 then 0.5::double
        else 0.0::double
    end;
