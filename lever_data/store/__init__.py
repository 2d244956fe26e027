"""The store on disk: runs committed whole or not at all, their manifests, tables and checksums.

Imports nothing of lever but ``errors``; everything that reads or writes a run goes through here.
"""
