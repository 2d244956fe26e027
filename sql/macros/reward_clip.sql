-- Bounds every reward: the legacy trainer clips to [-5, 5].
create or replace macro reward_clip(reward) as greatest(-5.0::double, least(5.0::double, reward::double));
