"""Example configurations, one per task and question; `lever run --config` takes a copy of one."""
