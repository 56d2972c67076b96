"""What the heads of a model do, as one page.

page        a report as one HTML file: text, tables of measures, figures and views of heads
"""
