"""A report as one HTML file: text, tables of measures, figures and views of heads. It asks the network for nothing.

    report = page.Page("Heads of a translator", "Five seeds, 500 held-out sentences.")
    section = report.section("Which heads link subject and verb")
    section.text("The best head of each layer.")
    section.table(["head", page.Column("accuracy", ".0%")], [["0·3", measure]], caption="Heads of the encoder.")
    section.figure(drawing, "Accuracy by layer.")
    section.view(view.heads(sentences), "Every head on four sentences.")
    report.save("report.html")

Whatever is handed in is text and is escaped, unless `element` made it.
"""

from mhajax.report.page.markup import element
from mhajax.report.page.report import Page, Section
from mhajax.report.page.table import Column, beats_baseline

__all__ = ["Column", "Page", "Section", "beats_baseline", "element"]
