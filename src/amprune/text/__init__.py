"""What a model is calibrated and trained on.

files.py        files and folders -> records
records.py      Alpaca, chats, pairs and plain text -> prompts and responses
calibration.py  a calibration set: seeded samples of token ids
training.py     instructions -> token ids and labels
tokens.py       start tokens, and rows of token ids
"""
