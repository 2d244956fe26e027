-- Bounds every reward: the legacy trainer clips to [-5, 5]. What is not finite stays as it is, so
-- that the reader can refuse it.
create or replace macro reward_clip(reward) as
    case
        when isfinite(reward::double)
            then greatest(-5.0::double, least(5.0::double, reward::double))
        else reward::double
    end;
