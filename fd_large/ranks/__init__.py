"""Ranks: how they start, meet and compute together, and how all end when one must.

`launch` finds out which rank this process is, and `distributed` joins the group of all. The other
ranks learn in three ways of what one rank meets alone. A mistake that a check raises is shared
where all ranks pass the same line (`distributed.together`; `meeting.meet` for checks that take
long). A rank that ends in between says so through the store, and a thread of each other rank ends
its own process within seconds (`failures`). A launcher that is gone says nothing, so each rank
looks for it in /proc (`processes`). Exit codes are those of `errors.Exit`. Only `distributed` and
`meeting` need torch.
"""
