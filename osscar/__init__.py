"""One-shot structured pruning of neural networks by combinatorial optimization.

>>> import osscar
>>> loaded = osscar.load_model("demo")
>>> calibration = loaded.calibration(samples=4, seqlen=64)
>>> result = osscar.prune(loaded.model, calibration, sparsity=0.5)
>>> result.parameters_after < result.parameters_before
True

Names are imported on first use, so that ``import osscar`` alone costs nothing; ``__init__.pyi``
lists them.
"""

from lazy_loader import attach_stub

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
