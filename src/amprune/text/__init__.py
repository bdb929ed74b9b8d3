"""What a model is calibrated and trained on.

sources.py      what --calibration and --data name, and how much of each is wanted
files.py        files and folders -> records
hub.py          data sets of the hub -> a stream of records
own.py          text that the dense model writes, as a file that is gone on with
sampling.py     how a model writes
records.py      Alpaca, chats, pairs and plain text -> prompts and responses
drawing.py      samples of several sources, by their weights
calibration.py  a calibration set: seeded samples of token ids
training.py     training data: token ids and labels
tokens.py       start tokens, and rows of token ids
"""
