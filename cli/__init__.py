"""The command line of lever: one thin file per command; parse, call one library verb, render."""
