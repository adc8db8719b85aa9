"""What a run is: sections, the table of named nets, and the runs of record. No torch."""
