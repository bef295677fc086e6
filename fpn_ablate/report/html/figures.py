"""Write the page's charts as figures for a paper, in the light theme's colours, as SVG and PDF."""

import json
import re
import sys
from functools import lru_cache
from textwrap import wrap
from typing import Any

from fpn_ablate.report.collate.table import Table, clean
from fpn_ablate.report.html import charts
from fpn_ablate.report.html.page import source
from fpn_ablate.report.html.vega import CONFIG, Chart, Spec
from fpn_ablate.utils.console import log_line

WIDTH, PANEL = 620, 260  # pixels of a chart, of one of several beside each other
FONT = "DejaVu Sans"  # ships with matplotlib: the same bytes on every machine


def render(table: Table) -> dict[str, bytes]:
    """Return {"recall.svg": ..., "recall.pdf": ..., "effects.svg": ...}, without charts for which the table has no data.

    There are none, and a line says so, where V8 lacks address space (`charts.too_little_space`).

    Equal tables give equal SVGs under one version of vl-convert; a PDF's resources have no fixed order.
    """
    if reason := charts.too_little_space():
        log_line(f"{table.name}: no figures: {reason}", sys.stderr)
        return {}
    import vl_convert

    images = {}
    for chart in charts.charts(table, charts.row_colours([table])[table.name]):
        if isinstance(chart, Chart):
            _register_font()
            svg = vl_convert.vegalite_to_svg(_in_light_theme(figure(table, chart)), allowed_base_urls=[])
            images |= {f"{chart.key}.svg": svg.encode(), f"{chart.key}.pdf": vl_convert.svg_to_pdf(svg)}
    return images


def figure(table: Table, chart: Chart) -> Spec:
    """Return a chart's specification with a title, a legend and the watermark, and with all its choices beside each other."""
    width = PANEL if len(chart.choices) > 1 else WIDTH
    panels = [_panel(table, chart, choice, width) for choice in chart.choices or (None,)]
    letters = int(width * len(panels) / 5.2)  # of a line: a long recipe name would be cut off at both ends
    names = f"{table.definition.table} · data {table.data} · recipe {table.recipe}"
    title = {"text": wrap(clean(names), letters), "subtitle": wrap(clean(chart.note), letters), "anchor": "start"}
    title |= {"fontSize": 10, "subtitleFontSize": 8}
    config = CONFIG | {"font": FONT, "background": "white", "title": {"fontWeight": "normal"}}
    whole = {"hconcat": panels, "resolve": {"scale": {"color": "shared"}}} if len(panels) > 1 else panels[0]
    return whole | {
        "title": title,
        "config": config,
        "params": [{"name": "highlight", "value": ""}, {"name": "narrow", "value": width == PANEL}],
    }


def _panel(table: Table, chart: Chart, choice: str | None, width: int) -> Spec:
    spec = {key: value for key, value in chart.spec.items() if key not in ("params", "autosize", "config")} | {"width": width}
    if choice is not None:
        shown = [point for point in spec["data"]["values"] if point[chart.choice_field] == choice]
        spec |= {"data": {"values": shown}, "transform": [], "title": clean(choice)}
    if spec["encoding"].get("color", {}).get("field") == "row":
        labels = {point["row"]: point["label"] for point in spec["data"]["values"]}
        legend = {"orient": "bottom", "columns": 2, "title": None, "labelLimit": 0, "symbolOpacity": 1}
        legend |= {"values": list(labels), "labelExpr": f"{json.dumps(labels)}[datum.value]"}
        spec["encoding"] = spec["encoding"] | {"color": spec["encoding"]["color"] | {"legend": legend}}
    if table.watermark:
        mark = {"type": "text", "text": table.watermark, "angle": -14, "fontSize": width / 14}
        places = {"x": width / 2, "y": spec["height"] / 2, "color": "black", "opacity": 0.16}
        at = {channel: {"value": value} for channel, value in places.items()}
        spec["layer"] = [*spec["layer"], {"data": {"values": [{}]}, "mark": mark, "encoding": at}]
    return spec


def _in_light_theme(spec: Spec) -> str:
    """Replace the CSS variables by the page's light colours."""
    light = dict(re.findall(r"--(\w+): light-dark\((#\w+),", source("page.css"))) | {"bg": "#ffffff"}
    return re.sub(r"var\(--(\w+)\)", lambda match: light.get(match[1], match[0]), json.dumps(spec))


@lru_cache
def _register_font() -> Any:
    import vl_convert
    from matplotlib import get_data_path

    vl_convert.register_font_directory(f"{get_data_path()}/fonts/ttf")
