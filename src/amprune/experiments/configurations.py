"""The folder beside holds settings of the paper; settings.py reads them."""
