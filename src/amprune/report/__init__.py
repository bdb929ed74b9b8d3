"""Reports and model cards, drawn from the JSON files and score files alone.

    evaluation.json and the records of the models -> report.md, report.html, figures/, README.md

write.py      START HERE: everything once, in order; files appear whole or not at all
inputs.py     what is read
measures.py   the same measurement of several models, and how they differ
contents.py   what is shown, from the sections of quality.py, speed.py, sizes.py, importance.py, training.py and
              provenance.py
blocks.py     paragraphs, tables and figures, before they are Markdown or HTML
numbers.py    figures as text, rounded to what their standard errors support
drawing.py    how figures look; figures_measured.py, figures_importance.py, figures_training.py draw them
labels.py     names beside points
card.py       the model card with its results
templates/    Markdown and HTML
"""
