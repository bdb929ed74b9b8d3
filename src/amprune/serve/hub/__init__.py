"""A checkpoint that amprune wrote, to a repository of the hub.

run.py         OUT -> commit, in order. START HERE
checks.py      what is refused before anything is sent, and what the card says of licence and base model
contents.py    which files of the folder go, with the paths of this machine in them cut down to their last name
repository.py  the hub: what is there, whether it may be written, the one commit
"""
