"""Ranks: how they start, meet and compute together, and how all end when one must.

`launch` finds out which rank this process is, and `distributed` joins the group of all. What one
rank meets alone the others learn of in three ways. A mistake that a check raises is shared where
all ranks pass the same line (`distributed.together`; `meeting.meet` for checks that take long). A
rank that ends in between says so through the store, and a thread of each other rank ends its own
process within seconds (`failures`). A launcher that is gone says nothing, so each rank looks for it
in /proc (`processes`). Exit codes are those of `errors.Exit`. Only `distributed` and `meeting` need
torch.
"""
