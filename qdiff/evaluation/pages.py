"""The pictures of an inspected model, and the page that shows them: one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qdiff.evaluation.inspection import Activations, Errors, Sensitivity, Shortcut, UnitLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by the colour-blind too
BANDS = 4  # layers whose ranges are drawn one by one
SHORTCUTS = 4
NAMED = 15  # layers in a bar chart
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2.2em; }
figure { margin: 1em 0; } figcaption { color: #555; font-size: .9em; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85em; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .facts td { text-align: left; } thead th { border-bottom: 2px solid #888; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then pictures with their captions, then a table."""

    title: str
    text: str
    pictures: Sequence[tuple[Figure, str]] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The HTML of the whole page.

    Args:
        facts: what was inspected, and how, in a table at the top.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _table(("", ""), list(facts.items()), head=False)]
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        parts += [_picture(figure, caption) for figure, caption in section.pictures]
        if section.rows:
            parts.append(_table(section.header, section.rows))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _picture(figure: Figure, caption: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    data = base64.b64encode(content.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure>\n<img alt="{text}" src="data:image/png;base64,{data}">\n<figcaption>{text}</figcaption>\n</figure>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, head: bool = True) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(header, 'th')}</thead>" if head else ""
    body = "\n".join(line(row, "td") for row in rows)
    kind = "" if head else ' class="facts"'
    return f'<div class="wide"><table{kind}>{top}\n<tbody>\n{body}\n</tbody></table></div>'


def _figure(rows: int, columns: int, height: float, width: float = 11.0) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


# The pictures.


def widest_swings(activations: Activations, count: int = BANDS) -> list[str]:
    """The layers whose range changes most over the timesteps; of several with the same input, as the layers that all
    take the time embedding, the first.
    """
    chosen: list[str] = []
    for path in sorted(activations.ranges, key=activations.swing, reverse=True):
        if not any(torch.equal(activations.ranges[path], activations.ranges[other]) for other in chosen):
            chosen.append(path)
    return chosen[:count]


def range_bands(activations: Activations, paths: Sequence[str]) -> Figure:
    """Minimum to maximum, 1 % to 99 % and median of some layers' inputs over the timesteps."""
    figure, axes = _figure(1, len(paths), 3.2)
    times = activations.timesteps.numpy()
    for axis, path in zip(axes[0], paths, strict=True):
        lowest, low, median, high, highest = activations.ranges[path].T.numpy()
        axis.fill_between(times, lowest, highest, color=BLUE, alpha=0.2, linewidth=0, label="minimum to maximum")
        axis.fill_between(times, low, high, color=BLUE, alpha=0.45, linewidth=0, label="1 % to 99 %")
        axis.plot(times, median, color=ORANGE, label="median")
        axis.set_title(path, fontsize=9)
        _towards_the_image(axis)
    axes[0][0].set_ylabel("input of the layer")
    axes[0][0].legend(fontsize=7)
    return figure


def range_map(activations: Activations) -> Figure:
    """Width of every layer's range at every timestep, as a share of the layer's widest."""
    from matplotlib.colors import LogNorm

    paths = list(activations.ranges)
    width = torch.stack([activations.ranges[path][:, 4] - activations.ranges[path][:, 0] for path in paths])
    share = (width / width.amax(1, keepdim=True).clamp(min=1e-12)).clamp(min=0.05)
    figure, ((axis,),) = _figure(1, 1, max(3.0, 0.075 * len(paths) + 1))
    image = axis.imshow(share.numpy(), aspect="auto", norm=LogNorm(0.05, 1), cmap="viridis", interpolation="nearest")
    axis.set_xticks(range(len(activations.timesteps)), [f"{t:g}" for t in activations.timesteps.tolist()], fontsize=7)
    axis.set_xlabel("timestep")
    step = max(1, len(paths) // 40)
    axis.set_yticks(range(0, len(paths), step), paths[::step], fontsize=6)
    figure.colorbar(
        image, label="range, as a share of the layer's widest", ticks=[0.05, 0.1, 0.2, 0.5, 1]
    ).ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["≤ 0.05", "0.1", "0.2", "0.5", "1"])
    return figure


def shortcut_modes(shortcuts: Sequence[Shortcut]) -> Figure:
    """Histograms of some shortcuts' inputs and weights, their two sides apart."""
    from matplotlib.ticker import NullFormatter

    figure, axes = _figure(2, len(shortcuts), 5.2)
    for column, shortcut in enumerate(shortcuts):
        pairs = (shortcut.decoder, shortcut.encoder), (shortcut.decoder_weight, shortcut.encoder_weight)
        for row, (decoder, encoder) in enumerate(pairs):
            axis = axes[row][column]
            both = torch.cat([decoder, encoder]).float()
            ends = float(both.min()), float(both.max())
            for values, colour, name in ((decoder, BLUE, "decoder"), (encoder, ORANGE, "encoder")):
                axis.hist(
                    values.float().numpy(), bins=80, range=ends, color=colour, alpha=0.55, density=True, label=name
                )
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=7)
            axis.set_title(shortcut.path if row == 0 else "its weight", fontsize=8)
    axes[0][0].set_ylabel("density of the input")
    axes[1][0].set_ylabel("density of the weight")
    axes[0][0].legend(fontsize=8)
    return figure


def sensitivity_bars(sensitivities: Sequence[Sensitivity]) -> Figure:
    """The layers that cost the output most when they alone are quantized: by their weight, and by their input."""
    kinds = ["weight", *(["activation"] if any(s.activation is not None for s in sensitivities) else [])]
    figure, axes = _figure(1, len(kinds), 4.2)
    for axis, kind, colour in zip(axes[0], kinds, (BLUE, ORANGE), strict=False):
        values = [(getattr(s, kind), _named(s)) for s in sensitivities if getattr(s, kind) is not None]
        worst = sorted(values, reverse=True)[:NAMED][::-1]
        axis.barh([name for _, name in worst], [value for value, _ in worst], color=colour)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xscale("log")
        axis.set_xlabel("relative output error")
        axis.set_title("its weight quantized" if kind == "weight" else "its input quantized", fontsize=10)
    return figure


def sensitivity_order(sensitivities: Sequence[Sensitivity]) -> Figure:
    """All layers in the order of the network."""
    figure, ((axis,),) = _figure(1, 1, 3.0)
    for kind, colour, marker in (("weight", BLUE, "o"), ("activation", ORANGE, "x")):
        points = [(i, getattr(s, kind)) for i, s in enumerate(sensitivities) if getattr(s, kind)]
        if points:
            places, errors = zip(*points, strict=True)
            axis.scatter(places, errors, s=16, color=colour, marker=marker, label=f"{kind} quantized")
    axis.set_yscale("log")
    axis.set_xlabel("layer, in the order of the network")
    axis.set_ylabel("relative output error")
    axis.legend(fontsize=8)
    return figure


def _named(sensitivity: Sensitivity) -> str:
    return sensitivity.path + (" (products)" if sensitivity.kind == "products" else "")


def error_curves(errors: Mapping[str, Errors], title: str) -> Figure:
    """Bias and variance step by step, one picture for each state of the network, on one scale."""
    figure, axes = _figure(1, len(errors), 3.4)
    for axis, (name, error) in zip(axes[0], errors.items(), strict=True):
        times = error.timesteps.numpy()
        axis.plot(times, error.total.numpy(), color=GREY, linewidth=3, alpha=0.4, label="both")
        axis.plot(times, error.variance.numpy(), color=BLUE, marker=".", label="variance")
        axis.plot(times, error.bias.clamp(min=0).numpy(), color=ORANGE, marker=".", label="bias, squared")
        axis.set_yscale("log", nonpositive="mask")
        axis.set_title(f"{title}: {name} quantized", fontsize=9)
        _towards_the_image(axis)
    lowest, highest = zip(*(axis.get_ylim() for axis in axes[0]), strict=True)
    for axis in axes[0]:
        axis.set_ylim(min(lowest), max(highest))
    axes[0][0].set_ylabel("share of the squared result")
    axes[0][0].legend(fontsize=8)
    return figure


def _towards_the_image(axis: Axes) -> None:
    axis.invert_xaxis()
    axis.set_xlabel("timestep: noise → image")
    axis.tick_params(labelsize=8)


def unit_losses(losses: Sequence[UnitLoss]) -> Figure:
    """What learning made of each unit's loss."""
    phases = list(dict.fromkeys(loss.phase for loss in losses))
    figure, axes = _figure(len(phases), 1, 3.0 * len(phases))
    for (axis,), phase in zip(axes, phases, strict=True):
        own = [loss for loss in losses if loss.phase == phase]
        places = range(len(own))
        axis.vlines(places, [u.after for u in own], [u.before for u in own], color=GREY, linewidth=1)
        axis.scatter(places, [u.before for u in own], color=ORANGE, s=16, label="before")
        axis.scatter(places, [u.after for u in own], color=BLUE, s=16, label="after")
        axis.set_yscale("log")
        axis.set_title(phase, fontsize=10)
        axis.set_xticks(places, [u.unit for u in own], rotation=90, fontsize=6)
        axis.set_ylabel("loss")
        axis.legend(fontsize=8)
    return figure
