"""Audits: diagnostics over a view, their verdict, their page, and gates."""
