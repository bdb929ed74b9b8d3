"""A checkpoint that amprune wrote, to a repository of the hub.

contents.py    which files of the folder go
places.py      paths of this machine in them, cut down to their last name
checks.py      what is refused before anything is sent, and what the card says of licence and base model
repository.py  the hub: what is there, whether it may be written, the one commit
run.py         OUT -> commit, in order. START HERE
"""
