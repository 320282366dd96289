"""Decides which pictures of a sweep are worth drawing.

They are drawn in `lines`, `heat_map`, `dot_plot`, `trade_off` and `forecast_picture`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlprune.analysis.dot_plot import draw_dot_plot
from mlprune.analysis.figures import by_sparsity
from mlprune.analysis.forecast_picture import MIN_TRIALS, draw_forecasts
from mlprune.analysis.heat_map import draw_heat_map, several_calibrations
from mlprune.analysis.lines import draw_lines
from mlprune.analysis.trade_off import draw_trade_off, has_likelihood
from mlprune.evaluation.estimates import Estimate
from mlprune.evaluation.forecasts import with_forecasts
from mlprune.storage.results import Result


def draw_pictures(
    dense: Result,
    results: Sequence[Result],
    languages: Sequence[str],
    title: str,
    folder: Path,
    stem: str,
    losses: Mapping[str, Estimate] | None = None,
) -> list[Path]:
    """Draw every picture that shows something of the sweep, and return the PNG files, the lines first.

    The metrics of `results` include the losses. `losses`: result key -> mean loss with its interval.
    """
    lines, heat_map, trade_off = (folder / f"{stem}{kind}.png" for kind in ("", "-calibrations", "-languages"))
    draw_lines(dense, results, languages, title, lines)
    files = [lines]
    if len(languages) > 1 and several_calibrations(results):
        draw_heat_map(results, languages, title, heat_map)
        files.append(heat_map)
    finite = [result for result in results if has_likelihood(result)]
    if len(languages) > 1 and any(len(group) > 1 for group in by_sparsity(finite).values()):
        files.append(folder / f"{stem}-losses.png")
        draw_dot_plot(results, languages, title, files[-1])
    if len(languages) > 1 and len(finite) > 1:
        draw_trade_off(results, title, trade_off, losses)
        files.append(trade_off)
    forecast = with_forecasts(results)
    if len(forecast) >= MIN_TRIALS:
        files.append(folder / f"{stem}-forecasts.png")
        draw_forecasts(dense, forecast, languages, title, files[-1])
    return files
