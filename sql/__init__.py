"""The SQL of lever: macros, staging, views, diagnostics and data tests, one relation a file."""
