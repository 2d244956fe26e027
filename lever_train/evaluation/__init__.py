"""What a selector is worth: held-out queries, baselines, outcomes, scoreboard."""
