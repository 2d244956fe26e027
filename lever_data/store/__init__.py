"""The store, on disk or in a bucket: runs whole or absent, their manifests, tables and checksums.

Imports nothing of lever but ``errors``; everything that reads or writes a run goes through here.
"""
