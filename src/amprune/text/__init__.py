"""What a model is calibrated and trained on.

files.py        files and folders -> records
records.py      Alpaca, chats, pairs and plain text -> prompts and responses
sources.py      what a set is called, one or several with weights; the hub
own.py          text that a model writes itself
calibration.py  a calibration set: seeded samples of token ids
training.py     instructions -> token ids and labels
tokens.py       start tokens, and rows of token ids
"""
