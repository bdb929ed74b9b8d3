"""The paper's tables and figures as recipes, on any supported model.

    MODEL -> scores/, models/ while measuring, evaluation.json -> experiment.json, report.md, report.html, figures/

run.py         START HERE: every cell once, in order
opening.py     models and data, opened before anything is begun
recipes.py     data: which models each experiment makes and what is measured on them
settings.py    everything else that decides figures; configurations/ holds those of the paper
cells.py       one cell: score, prune, train, measure
results.py     the folder and experiment.json: what was asked for and what is done
contents.py    what is shown: sections.py on quality, timing.py on speed, with tables.py and figures.py
"""
