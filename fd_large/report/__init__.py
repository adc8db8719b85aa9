"""Pictures, summary and tables, from the files of a run alone. No torch at import."""
