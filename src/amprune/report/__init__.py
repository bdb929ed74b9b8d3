"""Reports, drawn from the JSON files and score files alone.

    evaluation.json and the records of the models -> report.md, report.html, figures/, README.md

write.py      START HERE: everything once, in order; files appear whole or not at all
inputs.py     what is read
measures.py   the same measurement of several models, and how they differ
contents.py   what is shown: the summary, and a section from each of quality.py, speed.py, sizes.py, importance.py,
              reconstruction.py, training.py and provenance.py; a figure lies with the section that shows it
summary.py    an evaluation in few figures: for the terminal, and for the model card's front matter
grid.py       a grid of figures, and its renderers: terminal, Markdown, HTML
page.py       what a page consists of, as Markdown and as HTML; templates/ has the frame
numbers.py    figures as text, rounded to what their standard errors support
drawing.py    how drawn figures look; names beside points
"""
