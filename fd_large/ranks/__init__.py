"""Starts ranks, makes their collectives, and ends all ranks after a failure of one of them.

`launch` finds this process's rank, and `distributed` joins the process group of all ranks. Ranks
learn of a failure in three ways. An error that a check raises is shared at a line that all ranks
pass (`distributed.together`; `meeting.meet` for long checks). A rank that fails elsewhere reports
its end through the store, and a thread of each other rank ends its own process within seconds
(`failures`). A lost launcher reports nothing, so each rank looks for its launcher in /proc
(`processes`).

Exit codes are those of `errors.Exit`. Only `distributed` and `meeting` need torch.
"""
