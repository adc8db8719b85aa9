"""Starts the ranks, makes their collectives, and ends all of them after a failure.

`launch` finds this process's rank, and `distributed` joins the group of all. Ranks learn of
another rank's failure in three ways. A mistake raised by a check is shared at a line that all
ranks pass (`distributed.together`; `meeting.meet` for long checks). A rank that ends elsewhere
reports it through the store, and a thread of each other rank ends its own process within seconds
(`failures`). A lost launcher reports nothing, so each rank looks for it in /proc (`processes`).
Exit codes are those of `errors.Exit`. Only `distributed` and `meeting` need torch.
"""
