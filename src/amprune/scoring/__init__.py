"""What criteria are computed from: passes over a calibration set, and the weights themselves.

activations.py   one forward pass, with hooks on the output projections, for all criteria over activations
gradients.py     one forward pass, and one backward pass block by block
batches.py       the calibration set as padded batches
"""

from amprune.scoring.activations import measure_activations
from amprune.scoring.batches import check_calibration
from amprune.scoring.gradients import check_memory, score_gradients

__all__ = ["check_calibration", "check_memory", "measure_activations", "score_gradients"]
