"""Draw i-CLEVR pictures from lists of objects with a conditional diffusion model.

A thin layer over diffusers: `labels` and `dataset` hold the 24 labels and the pictures, `model`
and `pipeline` the denoising network and its sampler, `evaluator` the classifier that scores what
was drawn, `training` and `experiments` the training runs, `records` their results. Nothing is
imported here, so that using one part costs no more than that part.
"""

__version__ = "0.1.0"
