"""The embedded world of the demo: its questions, its proposals, its answerer, its files."""
