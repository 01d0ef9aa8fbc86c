"""Guidance by the evaluator: pictures drawn along the gradient of the judge that scores them.

The course allows it. No result of this project uses it: it shows what such a score is worth.
"""

from torch import Tensor

from lab7.diffusion import predict_x0, prediction_of
from lab7.evaluator import Evaluator
from lab7.pipeline import SETTINGS, ConditionalDDPMPipeline
from workshop.judges.fooling import log_probability_gradient


class EvaluatorGuidedPipeline(ConditionalDDPMPipeline):
    """Draws as another pipeline does, but moves each predicted x0 along the evaluator's gradient.

    To first order, knowing the labels y moves the mean of x0 given xt by its covariance times the
    gradient of log p(y | x0), here that of the evaluator at the predicted x0 (Bansal et al.,
    “Universal Guidance for Diffusion Models”, 2023, without their gradient through the network).
    The covariance is taken as `scale` times 1 - ᾱ: it shrinks as the noise does.

    Args:
        pipeline: The generator; it is left as it is.
        evaluator: The judge that guides.
        scale: How far x0 is moved; 0 turns it off.
    """

    def __init__(self, pipeline: ConditionalDDPMPipeline, evaluator: Evaluator, scale: float):
        settings = {name: pipeline.config[name] for name in SETTINGS}
        super().__init__(pipeline.unet, pipeline.scheduler, **settings)
        self.evaluator, self.scale = evaluator, scale

    def _predict(self, xt: Tensor, t: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """Predict as the pipeline does, and return the prediction that stands for the moved x0."""
        prediction = super()._predict(xt, t, cond, guidance_scale)
        factor, noise = self.unet.config.scaling_factor, 1 - self.scheduler.alphas_cumprod[int(t)]
        x0 = (predict_x0(self.scheduler, prediction, int(t), xt) / factor).clamp(-1, 1)
        moved = x0 + self.scale * noise * log_probability_gradient(self.evaluator, x0, cond)
        return prediction_of(self.scheduler, moved * factor, int(t), xt)
