"""What a run is: sections, the table of named models, and the runs of record. No torch."""
