"""`lpd evaluate`."""

from __future__ import annotations

from lpd_tools.evaluation.settings import Evaluation


def evaluate(config: Evaluation) -> None:
    """Draw images of every class and measure them and the model.

    Example: lpd evaluate --model model --out evaluation --reference folder:images --repeats 3
    """
    from lpd_tools.evaluation import evaluate as evaluation
    from lpd_tools.evaluation.report import show_results

    results = evaluation.evaluate(config)
    if results is not None:
        show_results(results, config.out)
