"""Files that come in, read without trust: JSON, torch files, vectors; which is which."""
