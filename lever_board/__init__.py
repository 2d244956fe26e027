"""`lever board`: a store in a browser. In goes a store, out come pages, served or as files.

May import ``lever_train.flow`` and what it may import, but nothing with a tensor in it: a page is
figures, and the server stays small. Imported by ``lever board`` alone.
"""
